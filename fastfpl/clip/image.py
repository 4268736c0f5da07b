"""Image towers: the family's own modules, frozen for good, pooled or token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastfpl.errors import KindError

__all__ = [
    "ForeignTower",
    "ImageTower",
    "ResNetTower",
    "TimmTower",
    "TransformersTower",
    "ViTTower",
    "eval_copy",
    "image_of",
]


class FixedLayerNorm(nn.Module):
    """LayerNorm in float32 or wider whatever the input, as the original CLIP has it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and return the dtype of ``x``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(wide), self.shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Show what the digest of the weights must know."""
        return f"{self.shape}, eps={self.eps}"


class FixedBatchNorm(nn.Module):
    """BatchNorm that only knows its running statistics: there is no mode in which it learns."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        if norm.running_mean is None:
            raise KindError(
                "fastfpl.load_clip: model must have running statistics in every BatchNorm; got none"
            )
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in the statistics' dtype and return the dtype of ``x``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.batch_norm(
            x.to(wide), self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Show what the digest of the weights must know."""
        return f"eps={self.eps}"


_NORMS = (nn.LayerNorm, _BatchNorm, FixedLayerNorm, FixedBatchNorm)


def frozen_copy(module: nn.Module, device: torch.device, dtype: torch.dtype, own: bool) -> Any:
    """Copy a tree of modules, not its weights, into eval mode and a dtype.

    Parameters share storage with the original's where device and dtype agree; buffers (running
    statistics) are copied, since an owner in train mode changes them in a forward pass; hooks stay
    behind. With ``own``, LayerNorm and BatchNorm keep their parameters in float32 or wider and
    BatchNorm loses its training mode; towers of unknown build are cast as a whole.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def cast(tensor: Tensor, part: nn.Module) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        norm = own and isinstance(part, _NORMS)
        return tensor.to(device=device, dtype=wide if norm else dtype)

    frozen = eval_copy(module, cast, hooks=False)
    return _fix_norms(frozen) if own else frozen


def eval_copy(
    module: nn.Module,
    cast: Callable[[Tensor, nn.Module], Tensor] = lambda tensor, part: tensor,
    *,
    hooks: bool,
) -> Any:
    """Copy a tree of modules into eval mode, its tensors through ``cast``, with hooks or without.

    Parameters share storage where ``cast`` returns what it is given. Those of an adapter that
    merges itself into its weights for a pass (peft) do not: it would write into the owner's.
    """
    memo: dict[int, Any] = {}
    merged = {
        id(p)
        for part in module.modules()
        if callable(getattr(part, "merge", None))
        for p in part.parameters()
    }
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            tensor = cast(parameter.detach(), part)
            if id(parameter) in merged and tensor.data_ptr() == parameter.data_ptr():
                tensor = tensor.clone()
            memo[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        for buffer in part.buffers(recurse=False):
            memo[id(buffer)] = cast(buffer.detach(), part).clone()
        for key, value in vars(part).items():
            if not hooks and key.endswith("hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # whatever else hangs on the modules has its own reasons
        raise KindError(
            f"fastfpl.load_clip: model must be one that copy.deepcopy can copy; got "
            f"{type(error).__name__}: {str(error).strip()}"
        ) from error
    for part in copied.modules():
        # not eval(): an adapter's own (loralib's) would merge into the weights that are shared
        part.training = False
    return copied


def _fix_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.LayerNorm):
        return FixedLayerNorm(module)
    if isinstance(module, _BatchNorm):
        return FixedBatchNorm(module)
    for name, child in module.named_children():
        fixed = _fix_norms(child)
        if fixed is not child:
            setattr(module, name, fixed)
    return module


class ImageTower:
    """A frozen image tower and what is known of it.

    Attributes
    ----------
    module : Module
        A copy of the family's modules that shares their parameters' storage; never in train mode.
    image_size : int
    patches : int or None
        Image tokens P that `tokens` gives beside the pooled one; None where it gives none.
    """

    own = True  # whether the modules' norms are replaced by the fixed ones above

    def __init__(
        self, module: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module = frozen_copy(module, device, dtype, self.own)
        self.image_size = image_size
        self.patches = self._patches()
        self._odd = ""

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageTower:
        """Return the tower on a device in a dtype; storage is shared where nothing changes."""
        moved = type(self)(self.module, self.image_size, device, dtype)
        if self._odd:
            moved.forget_patches(self._odd)
        return moved

    def forget_patches(self, why: str) -> None:
        """Give pooled features only; ``why`` goes on after "the tower, which"."""
        self.patches, self._odd = None, why

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Give every weight by name."""
        yield from self.module.state_dict().items()

    def facts(self) -> list[str]:
        """Give what decides the features beside the weights: layers, heads, eps, strides."""
        return [type(self).__name__] + [
            f"{name} {type(part).__name__ if any(True for _ in part.children()) else part!r} "
            f"{getattr(part, 'num_heads', '')}"
            for name, part in self.module.named_modules()
        ]

    def pooled(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> (B, D), not normalised: the family's own forward pass."""
        features = self.module(pixels)
        pooled: Tensor = features[0] if isinstance(features, tuple) else features
        return pooled

    def tokens(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> (B, 1 + P, D), not normalised; the first is the pooled one."""
        raise NotImplementedError  # FrozenCLIP refuses first: patches is None

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Give what `pooled` and `tokens` give, bit for bit, of one pass through the blocks."""
        return self.pooled(pixels), self.tokens(pixels)

    def why_no_patches(self) -> str:
        """Say how the tower pools, where its patches have no features of their own."""
        visual = self.module
        trunk = getattr(visual, "trunk", visual)
        if self._odd:
            return self._odd
        if getattr(trunk, "attn_pool", None) is not None:
            return "pools by attention with a learned query, which gives a patch no feature"
        pool = getattr(trunk, "global_pool", None) or getattr(visual, "pool_type", None)
        return f"pools its tokens by {pool!r}" if pool == "avg" else "pools in its own way"

    def _patches(self) -> int | None:
        return None


class ForeignTower(ImageTower):
    """A tower of unknown build (timm's, attention-pooled, ...): pooled features only."""

    own = False


class TimmTower(ForeignTower):
    """timm's vision transformers that pool by their class token, as EVA and EVA02 do."""

    def _patches(self) -> int:
        trunk = self.module.trunk
        return int(trunk.patch_embed.num_patches)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Apply the last norm and the heads, which work token by token, to every token."""
        return self._of(self.module.trunk.forward_features(pixels))

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pool what the blocks give as the trunk's own pass does."""
        trunk = self.module.trunk
        x = trunk.forward_features(pixels)
        pooled: Tensor = self.module.head(trunk.forward_head(x))
        return pooled, self._of(x)

    def _of(self, x: Tensor) -> Tensor:
        trunk = self.module.trunk
        features: Tensor = self.module.head(trunk.head(trunk.fc_norm(x)))
        # behind the class token there may be registers
        return torch.cat((features[:, :1], features[:, trunk.num_prefix_tokens :]), dim=1)


class _Kept(nn.Module):
    """Blocks that keep what they gave last."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.states: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.states = self.blocks(x)
        return self.states


class ViTTower(ImageTower):
    """The vision transformer of OpenAI's package and of open_clip."""

    def _patches(self) -> int | None:
        visual = self.module
        plain = getattr(visual, "pool_type", "tok") == "tok" and visual.proj is not None
        if not plain or getattr(visual, "attn_pool", None) is not None:
            return None
        return int(visual.positional_embedding.shape[0]) - 1

    def tokens(self, pixels: Tensor) -> Tensor:
        """Apply ``ln_post`` and the projection to every token."""
        visual = self.module
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, P, width)
        cls = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + visual.positional_embedding.to(x.dtype)
        x = visual.ln_pre(x)
        if self._batch_first:
            return self._of(visual.transformer(x))
        return self._of(visual.transformer(x.transpose(0, 1)).transpose(0, 1))

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what the blocks give to the family's own forward pass."""
        # a view of the modules of this call's own: others may be in the same tower meanwhile
        whole = copy.copy(self.module)
        kept = _Kept(self.module.transformer)
        whole._modules = {**self.module._modules, "transformer": kept}
        features = whole(pixels)
        states = kept.states if self._batch_first else kept.states.transpose(0, 1)
        return (features[0] if isinstance(features, tuple) else features), self._of(states)

    @property
    def _batch_first(self) -> bool:
        # open_clip's transformer takes (B, tokens, width) and says so; the original's has no word
        return hasattr(self.module.transformer, "batch_first")

    def _of(self, states: Tensor) -> Tensor:
        features: Tensor = self.module.ln_post(states) @ self.module.proj
        return features


class ResNetTower(ImageTower):
    """The modified ResNet of OpenAI's package and of open_clip, with its attention pool."""

    def __init__(
        self, module: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(module, image_size, device, dtype)
        # two views of one copy: the trunk alone, for its feature map, and the whole
        self.trunk = copy.copy(self.module)
        self.trunk._modules = {**self.module._modules, "attnpool": nn.Identity()}

    def _patches(self) -> int:
        return int(self.module.attnpool.positional_embedding.shape[0]) - 1

    def tokens(self, pixels: Tensor) -> Tensor:
        """Pool with every token as the query; the first, the mean token, is the usual one."""
        return self._of(self.trunk(pixels))

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pool one feature map in the family's way, and with every token as the query."""
        x = self.trunk(pixels)
        pooled: Tensor = self.module.attnpool(x)
        return pooled, self._of(x)

    def _of(self, x: Tensor) -> Tensor:
        pool = self.module.attnpool
        x = x.flatten(2).permute(2, 0, 1)  # (P, B, C)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        x = x + pool.positional_embedding[:, None].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            embed_dim_to_check=x.shape[-1],
            num_heads=pool.num_heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=pool.c_proj.weight,
            out_proj_bias=pool.c_proj.bias,
            training=False,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=pool.q_proj.weight,
            k_proj_weight=pool.k_proj.weight,
            v_proj_weight=pool.v_proj.weight,
        )
        return x.transpose(0, 1)


class TransformersTower(ImageTower):
    """The vision model of a transformers ``CLIPModel`` with its projection."""

    def _patches(self) -> int:
        return int(self.module.model.embeddings.position_embedding.weight.shape[0]) - 1

    def pooled(self, pixels: Tensor) -> Tensor:
        """Project the post-normalised class token."""
        out = self.module.model(pixel_values=pixels, return_dict=True)
        features: Tensor = self.module.projection(out.pooler_output)
        return features

    def tokens(self, pixels: Tensor) -> Tensor:
        """Apply the last LayerNorm and the projection to every token."""
        return self.both(pixels)[1]

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Take both of the model's outputs."""
        model, project = self.module.model, self.module.projection
        out = model(pixel_values=pixels, return_dict=True)
        return project(out.pooler_output), project(model.post_layernorm(out.last_hidden_state))


def image_of(model: Any, device: torch.device, dtype: torch.dtype) -> ImageTower:
    """Take the image tower of a model, recognised by its structure."""
    if hasattr(model, "vision_model"):
        pair = nn.ModuleDict()
        pair.add_module("model", model.vision_model)
        pair.add_module("projection", model.visual_projection)
        size = model.vision_model.embeddings.image_size
        return TransformersTower(pair, _square(size), device, dtype)
    visual = model.visual
    size = getattr(visual, "image_size", None) or getattr(visual, "input_resolution", None)
    kind: type[ImageTower]
    if hasattr(visual, "attnpool") and hasattr(visual, "layer4"):
        kind = ResNetTower
    elif hasattr(visual, "class_embedding") and hasattr(visual, "ln_post"):
        kind = ViTTower
    elif _pools_by_token(visual):
        kind = TimmTower
    else:
        kind = ForeignTower
    return kind(visual, _square(size), device, dtype)


def _pools_by_token(visual: Any) -> bool:
    """Recognise timm's vision transformers whose feature is a projection of the class token."""
    trunk = getattr(visual, "trunk", None)
    head = getattr(visual, "head", None)
    linear = isinstance(head, nn.Sequential) and all(
        isinstance(part, nn.Linear | nn.Dropout) for part in head
    )
    return (
        linear
        and getattr(trunk, "global_pool", None) == "token"
        and getattr(trunk, "attn_pool", None) is None
        and getattr(trunk, "num_prefix_tokens", 0) > 0
        and isinstance(getattr(trunk, "head", None), nn.Linear | nn.Identity)
        and isinstance(getattr(trunk, "fc_norm", None), nn.LayerNorm | nn.Identity)
        and getattr(getattr(trunk, "patch_embed", None), "num_patches", None) is not None
    )


def _square(size: Any) -> int:
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise KindError(f"fastfpl.load_clip: model must take square images; got size {size!r}")
    return sides[0]
