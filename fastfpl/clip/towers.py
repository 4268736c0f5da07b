"""Text towers of every family, converted to one set of frozen weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfpl.clip.tokenizer import Tokenizer
from fastfpl.errors import InputError, KindError
from fastfpl.reference.text import Block, TextTower

__all__ = [
    "Family",
    "Pooling",
    "activation_of",
    "check_causal",
    "check_plain",
    "family_of",
    "layer_weights",
    "pooling_of",
    "read_parts",
    "resblock_weights",
    "text_blocks",
    "text_of",
    "vocabulary_of",
]

Family = Literal["resblocks", "transformers"]


class _Odd(KindError):
    """A part of a text tower that is not what it should be; `text_of` says where it stands."""

    def __init__(self, rule: str, got: str, part: Any) -> None:
        super().__init__(f"fastfpl.load_clip: model must {rule}; got {got}")
        self.part = part


class Pooling(NamedTuple):
    """Whose state becomes the feature.

    ``rule`` is "argmax" or "eos", two ways to find the EOT token, with the id that "eos" looks for,
    or "last".
    """

    rule: str
    eos: int | None


def family_of(model: Any) -> Family:
    """Recognise a model by its structure.

    ``"resblocks"`` is OpenAI's package and open_clip, whose text tower may lie in ``model.text``;
    ``"transformers"`` is Hugging Face's ``CLIPModel``.
    """
    if isinstance(model, torch.jit.ScriptModule):
        _refuse("be a plain module", "a TorchScript one; load it with jit=False")
    if not isinstance(model, nn.Module):
        _refuse("be a model name or a live CLIP model", type(model).__name__)
    if hasattr(model, "text_decoder"):
        _refuse("be a plain CLIP", f"{type(model).__name__}, a captioning model (CoCa)")
    both = ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale")
    if all(hasattr(model, name) for name in both):
        return "transformers"
    if hasattr(model, "visual") and hasattr(model, "logit_scale"):
        text = _inner(model)
        if hasattr(text, "transformer") and hasattr(text.transformer, "resblocks"):
            return "resblocks"
        _refuse("have CLIP's causal text transformer", f"text tower {type(text).__name__}")
    _refuse(
        "have the layout of open_clip, OpenAI's clip or transformers' CLIPModel",
        f"{type(model).__name__}",
    )


def vocabulary_of(model: Any, family: Family) -> int:
    """Give the number of token embeddings."""
    return int(_embedding(model, family).weight.shape[0])


def pooling_of(model: Any, family: Family) -> Pooling:
    """Tell which token's state becomes the text feature."""
    if family == "transformers":
        if not hasattr(model.text_model, "eos_token_id"):
            _refuse(
                "have CLIP's causal text transformer, pooled at its EOT token",
                f"text tower {type(model.text_model).__name__} without eos_token_id",
            )
        # transformers keeps the old argmax rule for configs that still say 2, see its pull 24773
        own = int(model.text_model.eos_token_id)
        return Pooling("argmax", None) if own == 2 else Pooling("eos", own)
    text = _inner(model)
    rule: str
    eos: int | None
    if text is model:  # OpenAI's clip has neither attribute: argmax
        rule, eos = getattr(model, "text_pool_type", "argmax"), getattr(model, "text_eos_id", None)
    else:
        rule, eos = text.pool_type, text.eos_id
    if rule not in ("argmax", "eos", "last"):
        _refuse("pool the text at its EOT token or at the last one", f"pool_type {rule!r}")
    return Pooling(rule, eos if rule == "eos" else None)


def text_of(model: Any, family: Family, tokens: Tokenizer) -> TextTower:
    """Convert a model's text tower; weights are shared, not copied, wherever the layout agrees.

    Parameters
    ----------
    model : Module
    family : str
        As `family_of` has it.
    tokens : Tokenizer
        Gives the ids that begin and end a prompt, and the one behind it.

    Returns
    -------
    TextTower
        Its tensors need no gradient. Only the fused query, key and value weights of transformers
        are copies.

    Raises
    ------
    KindError
        If the tower is not a plain one: a mask that is neither causal nor absent, extra norms,
        LayerScale, a class token, adapters in place of linear layers, an unknown activation.
    InputError
        If pads reach the features and the tokenizer has none.
    """
    read = _transformers if family == "transformers" else _resblocks
    try:
        with torch.no_grad():
            tower = read(model, tokens)
    except _Odd as odd:
        paths = [name for name, part in model.named_modules() if part is odd.part]
        raise KindError(f"{odd} at {paths[0]}" if paths else str(odd)) from None
    if not tower.whole:
        return tower
    if tokens.pad is None:
        raise InputError(
            "fastfpl.load_clip: tokenizer must have a padding token for a text tower that sees the "
            "pads behind a prompt; got none"
        )
    return replace(tower, pad=tokens.pad)


def _resblocks(model: Any, tokens: Tokenizer) -> TextTower:
    text = _inner(model)
    if getattr(text, "cls_emb", None) is not None:
        _refuse("have no class token in its text tower", "one (CoCa)")
    if getattr(text, "use_pad_mask", False):
        _refuse("let every token see the pads, or none", "a mask of the pads alone")
    blocks = text_blocks(model, "resblocks")
    causal = _is_causal(text, blocks)
    for i, block in enumerate(blocks):
        check_plain(i, block)
    norms = [n for b in blocks for n in (b.ln_1, b.ln_2)] + [text.ln_final]
    projection, projection_b = _projection(text.text_projection, text.positional_embedding)
    return TextTower(
        token_embedding=text.token_embedding.weight.detach(),
        positional=text.positional_embedding.detach(),
        blocks=tuple(resblock_weights(b) for b in blocks),
        ln_w=_norm(text.ln_final)[0],
        ln_b=_norm(text.ln_final)[1],
        projection=projection,
        projection_b=projection_b,
        heads=_one("number of heads", (b.attn.num_heads for b in blocks)),
        activation=_one("activation", (activation_of(b.mlp.gelu) for b in blocks)),
        eps=_one("LayerNorm eps", (n.eps for n in norms)),
        sos=tokens.sos,
        eot=tokens.eot,
        causal=causal,
        pooling="last" if pooling_of(model, "resblocks").rule == "last" else "eot",
    )


def _transformers(model: Any, tokens: Tokenizer) -> TextTower:
    text = model.text_model
    if not hasattr(text, "final_layer_norm") or not hasattr(text.embeddings, "token_embedding"):
        _refuse("have CLIP's causal text transformer", f"text tower {type(text).__name__}")
    layers = text_blocks(model, "transformers")
    norms = [n for b in layers for n in (b.layer_norm1, b.layer_norm2)] + [text.final_layer_norm]
    positional = text.embeddings.position_embedding.weight
    projection, projection_b = _projection(model.text_projection, positional)
    return TextTower(
        token_embedding=text.embeddings.token_embedding.weight.detach(),
        positional=positional.detach(),
        blocks=tuple(layer_weights(b) for b in layers),
        ln_w=_norm(text.final_layer_norm)[0],
        ln_b=_norm(text.final_layer_norm)[1],
        projection=projection,
        projection_b=projection_b,
        heads=_one("number of heads", (b.self_attn.num_heads for b in layers)),
        activation=_one("activation", (activation_of(b.mlp.activation_fn) for b in layers)),
        eps=_one("LayerNorm eps", (n.eps for n in norms)),
        sos=tokens.sos,
        eot=tokens.eot,
    )


def text_blocks(model: Any, family: Family) -> list[Any]:
    """Give the blocks of the text tower."""
    if family == "transformers":
        return list(model.text_model.encoder.layers)
    return list(_inner(model).transformer.resblocks)


def read_parts(model: Any, family: Family) -> list[Any]:
    """Give every parameter of the text tower, and every module whose weights, that `text_of` reads.

    What else lies beside the image tower is an adapter's, or nothing that a pass would need.
    """
    if family == "transformers":
        text = model.text_model
        embeddings = text.embeddings
        parts = [embeddings.token_embedding, embeddings.position_embedding, text.final_layer_norm]
        for layer in text_blocks(model, family):
            attn, mlp = layer.self_attn, layer.mlp
            parts += [layer.layer_norm1, attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj]
            parts += [layer.layer_norm2, mlp.fc1, mlp.fc2]
        return [*parts, model.text_projection]
    text = _inner(model)
    parts = [text.token_embedding, text.positional_embedding, text.ln_final, text.text_projection]
    parts.append(getattr(text, "attn_mask", None))
    for block in text_blocks(model, family):
        attn, mlp = block.attn, block.mlp
        parts += [block.ln_1, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj]
        parts += [block.ln_2, mlp.c_fc, mlp.c_proj, getattr(block, "attn_mask", None)]
    return parts


def resblock_weights(block: Any) -> Block:
    """Read one block of OpenAI's clip or open_clip; every tensor shares the block's storage."""
    return Block(
        *_norm(block.ln_1),
        block.attn.in_proj_weight.detach(),
        _bias(block.attn.in_proj_bias, block.attn.in_proj_weight),
        *_linear(block.attn.out_proj),
        *_norm(block.ln_2),
        *_linear(block.mlp.c_fc),
        *_linear(block.mlp.c_proj),
    )


def layer_weights(layer: Any) -> Block:
    """Read one layer of transformers; its query, key and value weights are fused, thus copied."""
    attn = layer.self_attn
    qkv = [_linear(p) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    return Block(
        *_norm(layer.layer_norm1),
        torch.cat([w for w, _ in qkv]),
        torch.cat([b for _, b in qkv]),
        *_linear(attn.out_proj),
        *_norm(layer.layer_norm2),
        *_linear(layer.mlp.fc1),
        *_linear(layer.mlp.fc2),
    )


def _refuse(rule: str, got: str) -> NoReturn:
    raise KindError(f"fastfpl.load_clip: model must {rule}; got {got}")


def _inner(model: Any) -> Any:
    """Give the module that holds the text tower's parts."""
    return model.text if isinstance(getattr(model, "text", None), nn.Module) else model


def _embedding(model: Any, family: Family) -> Any:
    if family == "resblocks":
        return _inner(model).token_embedding
    embeddings = model.text_model.embeddings
    if not hasattr(embeddings, "token_embedding"):
        _refuse("have CLIP's causal text transformer", f"{type(model.text_model).__name__}")
    return embeddings.token_embedding


def check_causal(text: Any, blocks: list[Any]) -> None:
    """Refuse a tower whose attention mask, where it can be seen, is not the causal one."""
    if not _is_causal(text, blocks):
        _refuse("have a causal text tower", "a bidirectional one (no attention mask)")


def _is_causal(text: Any, blocks: list[Any]) -> bool:
    """Tell a causal tower from a bidirectional one by its masks; refuse what is neither."""
    # open_clip hands one mask to the transformer, the original keeps one in each block
    if hasattr(text, "attn_mask"):
        masks = [text.attn_mask]
    else:
        masks = [block.attn_mask for block in blocks]
    found = set()
    for mask in masks:
        hides = mask is not None
        if mask is not None:
            hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
            seen = torch.zeros_like(mask) if mask.dtype == torch.bool else mask
            if not torch.equal(hidden, torch.ones_like(hidden).triu(1)) or seen[~hidden].any():
                _refuse(
                    "have a causal text tower or one without a mask",
                    "an attention mask that is not causal",
                )
        found.add(hides)
    if len(found) != 1:
        _refuse("have one attention mask in its text tower", "causal blocks and bidirectional ones")
    return found.pop()


def check_plain(i: int, block: Any) -> None:
    """Refuse whatever `TextTower` has no place for."""
    attn = block.attn
    extras = {
        "ls_1": block,
        "ls_2": block,
        "ln_attn": block,
        "ln_q": attn,
        "ln_k": attn,
        "ln_inner": attn,
        "head_scale": attn,
        "logit_scale": attn,
        "bias_k": attn,
        "ln": block.mlp,
    }
    for name, owner in extras.items():
        extra = getattr(owner, name, None)
        if extra is not None and not isinstance(extra, nn.Identity):
            _refuse("have plain text blocks", f"{name} in block {i}")
    if getattr(attn, "in_proj_weight", None) is None or getattr(attn, "add_zero_attn", False):
        _refuse("have plain text blocks", f"{type(attn).__name__} in block {i}")


def _linear(layer: Any) -> tuple[Tensor, Tensor]:
    # an adapter (peft) passes for its base layer by attribute; its own part would be lost
    if not isinstance(layer, nn.Linear):
        raise _Odd("have plain linear layers in its text tower", type(layer).__name__, layer)
    if not layer.weight.is_floating_point():
        raise _Odd("have floating point weights", f"{layer.weight.dtype}", layer)
    return layer.weight.detach(), _bias(layer.bias, layer.weight)


def _norm(layer: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, nn.LayerNorm) or layer.weight is None:
        raise _Odd("have LayerNorms with weights in its text tower", type(layer).__name__, layer)
    return layer.weight.detach(), _bias(layer.bias, layer.weight)


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()


def _projection(projection: Any, positional: Tensor) -> tuple[Tensor, Tensor | None]:
    if projection is None:  # the states are the features
        width = positional.shape[1]
        return torch.eye(width, dtype=positional.dtype, device=positional.device), None
    if isinstance(projection, Tensor):
        return projection.detach(), None
    weight, bias = _linear(projection)
    return weight.t(), None if projection.bias is None else bias


def activation_of(module: Any) -> Literal["quick_gelu", "gelu", "gelu_tanh"]:
    """Tell the activation by what it does, since every family has its own class for it."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float32)
    y = module.forward(x)  # past the owner's hooks
    if torch.allclose(y, x * torch.sigmoid(1.702 * x), rtol=0, atol=1e-6):
        return "quick_gelu"
    if torch.allclose(y, F.gelu(x), rtol=0, atol=1e-6):
        return "gelu"
    if torch.allclose(y, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6):
        return "gelu_tanh"
    _refuse("use QuickGELU or GELU in its text tower", type(module).__name__)


def _one(what: str, values: Iterable[Any]) -> Any:
    found = set(values)
    if len(found) != 1:
        raise InputError(
            f"fastfpl.load_clip: model must have one {what} in its text tower; got {sorted(found)}"
        )
    return found.pop()
