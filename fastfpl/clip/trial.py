"""What is read out of a live model proves itself: it must do what the model's own passes do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfpl.clip.checkpoints import first_line
from fastfpl.clip.image import ImageTower, eval_copy, image_of
from fastfpl.clip.tokenizer import Tokenizer
from fastfpl.clip.towers import Family, pooling_of, read_parts, text_blocks, text_of
from fastfpl.errors import KindError
from fastfpl.reference.text import (
    Block,
    PromptLayout,
    TextTower,
    activate,
    block_norm,
    encode_text,
)

__all__ = ["check_tensors", "prove"]

OP = "fastfpl.load_clip"
CURE = "merge adapters into the weights, and remove hooks and replaced methods, before loading"
# how far two orders of the same sums may be apart, as a share of a feature's length
_OFF = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-4}
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def check_tensors(model: nn.Module) -> None:
    """Refuse weights that are no plain tensors of numbers in memory (quantised, sharded, meta)."""
    plain = (Tensor, nn.Parameter)
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        numbers = tensor.is_floating_point() or not isinstance(tensor, nn.Parameter)
        if type(tensor) in plain and not tensor.is_meta and numbers:
            continue
        kind = type(tensor.data).__name__ if type(tensor) in plain else type(tensor).__name__
        raise KindError(
            f"{OP}: model must have its weights as plain floating point tensors in memory; got "
            f"{kind} of {tensor.dtype} on {tensor.device.type} at {path}; load it without "
            "quantisation or sharding"
        )


def prove(model: nn.Module, family: Family, tokens: Tokenizer, image: ImageTower) -> None:
    """Compare what is read out of a model with the model's own passes, or refuse.

    Few random tokens of three lengths go through ``encode_text`` (``get_text_features``), random
    pixels through ``encode_image`` (``get_image_features``), both of a copy in eval mode that
    shares the weights and keeps the hooks. What the reading does not account for is then moved off
    its values, on a copy again: an adapter that does nothing at first shows itself. A tower whose
    pooled feature is not the first of its tokens gives no patches.

    Parameters
    ----------
    model : Module
    family : str
    tokens : Tokenizer
    image : ImageTower
        Of the model; it loses its patches where they do not fit the pooled feature.

    Raises
    ------
    KindError
        If the model does something else, naming the path of the part that is to blame.
    """
    twin = _Twin(eval_copy(model, hooks=True), family, tokens)
    with _quiet(model):
        twin.try_text()
        twin.try_image()
        twin.check_hooks()
        twin.check_patches(image)
        if twin.move_the_rest():
            twin.try_text()
            twin.try_image()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Hold the caller's generators, gradients, autocast and filters off the trial."""
    devices = {p.device for p in model.parameters()} - {torch.device("cpu")}
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]), torch.no_grad():
        kinds = {d.type for d in devices} | {"cpu"}
        off = [torch.autocast(kind, enabled=False) for kind in sorted(kinds)]
        for one in off:
            one.__enter__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for one in off:
                one.__exit__(None, None, None)


@dataclass
class _Twin:
    """A copy of the model on trial."""

    model: Any
    family: Family
    tokens: Tokenizer
    moved: list[str] = field(default_factory=list)
    # hooks that have replaced what passed them
    replaced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read: tuple[ImageTower, Tensor] | None = None
        # before any pass: an adapter may put other parameters into the place of those that are read
        self._rest = self._unread()
        for path, part in self.model.named_modules():
            for kind in _FORWARD_HOOKS:
                hooks = getattr(part, kind)
                for key, hook in hooks.items():
                    hooks[key] = _Watched(hook, path, self.replaced)

    # --- texts ------------------------------------------------------------------------------------

    def try_text(self) -> None:
        """Compare texts, or refuse."""
        tower = text_of(self.model, self.family, self.tokens)
        kind = tower.blocks[0].qkv_w.dtype if tower.blocks else tower.dtype
        tower = tower.to(tower.device, kind)
        layout = self._rows(tower)
        empty = tower.projection.new_zeros(0, tower.width)
        ours = encode_text(tower, layout, empty, False)
        theirs, seen = self._listen(lambda: self._encode_text(layout.tokens))
        off = _distance(ours, F.normalize(theirs.to(ours), dim=-1))
        if not off <= self._off(tower):
            self._refuse("texts", off, self._text_culprit(tower, seen))

    def _rows(self, tower: TextTower) -> PromptLayout:
        """Draw prompts of one token, of half the length and of all of it."""
        draw = torch.Generator().manual_seed(0)
        length, words = tower.context_length, tower.token_embedding.shape[0]
        rule, _ = pooling_of(self.model, self.family)
        most = length - tower.begin - 1
        rows = torch.full((3, length), tower.pad, dtype=torch.int64)
        # the model finds the EOT as the largest id, or by its own: none may stand before it
        ids = torch.randint(
            max(tower.eot, 1) if rule == "argmax" else words, rows.shape, generator=draw
        )
        if rule != "argmax":
            ids[ids == tower.eot] = (tower.eot + 1) % words
        ends = []
        for row, some, count in zip(rows, ids, (1, most // 2, most), strict=True):
            end = tower.begin + count
            row[:end] = some[:end]
            row[end] = tower.eot
            ends.append(end)
        if tower.sos is not None:
            rows[:, 0] = tower.sos
        slots = torch.zeros(3, 0, dtype=torch.int64)
        where = tower.device
        return PromptLayout(
            rows.to(where), slots.to(where), torch.tensor(ends).to(where), tower.begin, tower.begin
        )

    def _encode_text(self, rows: Tensor) -> Tensor:
        name = "get_text_features" if self.family == "transformers" else "encode_text"
        return self._own(name, rows)

    def _text_culprit(self, tower: TextTower, seen: list[_Call]) -> str | None:
        """Find the first part of a pass that does not do what it was read to do."""
        plain = _plain_parts(self.model, self.family, tower)
        for call in seen:
            if call.path in plain and call.differs(plain[call.path], self._off(tower)):
                return call.path
        return None

    # --- images -----------------------------------------------------------------------------------

    def try_image(self) -> None:
        """Compare images, or refuse."""
        tower, pixels = self._image()
        ours, mine = _record(tower.module, lambda: tower.pooled(pixels))
        theirs, seen = self._listen(lambda: self._encode_image(pixels))
        off = _distance(ours, theirs.to(ours))
        if off <= self._off(pixels):
            return
        known = {self._in_model(call.path): call.output for call in mine}
        culprits = (
            call.path
            for call in seen
            if call.path in known
            and not _distance(known[call.path], call.output) <= self._off(pixels)
        )
        self._refuse("images", off, next(culprits, None))

    def check_patches(self, image: ImageTower) -> None:
        """Take the patches from a tower that does more than its tokens are made by."""
        tower, pixels = self._image()
        if tower.patches is None:
            return
        try:
            tokens = tower.tokens(pixels)
            beside = tower.both(pixels)
        except Exception as error:  # the modules are somebody else's
            image.forget_patches(f"refuses its tokens with {first_line(error)}")
            return
        pooled = tower.pooled(pixels)
        shape = (1, tower.patches + 1, pooled.shape[-1])
        same = ((tokens[:, 0], pooled), (beside[0], pooled), (beside[1], tokens))
        fits = tokens.shape == shape and all(a.shape == b.shape for a, b in same)
        if not fits or not all(_distance(a, b) <= self._off(pixels) for a, b in same):
            image.forget_patches("does more in its own pass than CLIP's image towers do")

    def _image(self) -> tuple[ImageTower, Tensor]:
        """Read the image tower, once for the values that the copy has, and draw pixels."""
        if self._read is not None:
            return self._read
        sides = _image_sides(self.model).values()
        weights = [p for side in sides for p in side.parameters() if p.is_floating_point()]
        # OpenAI's 16-bit towers keep some parameters in 32
        like = min(weights, key=lambda p: p.dtype.itemsize)
        tower = image_of(self.model, like.device, like.dtype)
        side = tower.image_size
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, side, side, generator=draw, dtype=torch.float32).to(like)
        self._read = tower, pixels
        return self._read

    def _encode_image(self, pixels: Tensor) -> Tensor:
        name = "get_image_features" if self.family == "transformers" else "encode_image"
        return self._own(name, pixels)

    def _in_model(self, path: str) -> str:
        """Give the name in the model of a module, or a weight, of the image tower."""
        names: dict[int, str] = {id(part): name for name, part in self.model.named_modules()}
        for inner, side in _image_sides(self.model).items():
            if path == inner or not inner or path.startswith(f"{inner}."):
                return (names[id(side)] + "." + path[len(inner) :].lstrip(".")).strip(".")
        return path

    # --- both -------------------------------------------------------------------------------------

    def _off(self, like: Tensor | TextTower) -> float:
        # a card may round the factors of float32 products to 11 bits
        rounded = like.device.type != "cpu" and like.dtype == torch.float32
        return 5e-3 if rounded else _OFF[like.dtype]

    def check_hooks(self) -> None:
        """Refuse hooks that replace what passes: what they add may be nothing yet."""
        if self.replaced:
            raise KindError(
                f"{OP}: model must have no hook that replaces what passes it, since hooks are not "
                f"taken along; got one at {self.replaced[0] or 'the model itself'}; {CURE}"
            )

    def _unread(self) -> list[str]:
        """Name every parameter and buffer that no reading accounts for."""
        read = {id(t) for part in read_parts(self.model, self.family) for t in _tensors(part)}
        read |= {id(getattr(self.model, name, None)) for name in ("logit_scale", "logit_bias")}
        module = self._image()[0].module
        carried = (*module.named_parameters(), *module.named_buffers())
        taken = {self._in_model(name) for name, _ in carried}
        return [
            path
            for path, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if id(tensor) not in read and path not in taken and tensor.is_floating_point()
        ]

    def move_the_rest(self) -> bool:
        """Move what no reading accounts for off its values, in the copy alone."""
        draw = torch.Generator().manual_seed(0)
        tensors = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        for path in self._rest:
            tensor = tensors[path]
            noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float32)
            # a new tensor: the storage is the owner's too
            tensor.data = tensor.detach() + noise.to(tensor)
        self.moved, self._read = self._rest, None
        return bool(self.moved)

    def _own(self, name: str, given: Tensor) -> Tensor:
        method = getattr(self.model, name, None)
        if not callable(method):
            raise KindError(
                f"{OP}: model must have a method {name} of its own, which what is read from it is "
                f"compared with; got {type(self.model).__name__} without"
            )
        try:
            found = method(given)
        except Exception as error:  # the model is somebody else's
            raise KindError(
                f"{OP}: model must run its own {name}; got {first_line(error)}"
            ) from error
        found = found if isinstance(found, Tensor) else getattr(found, "pooler_output", None)
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise KindError(
                f"{OP}: model must give features of shape (B, D) from its own {name}; got "
                + (str(tuple(found.shape)) if isinstance(found, Tensor) else "another kind")
            )
        return found

    def _listen(self, run: Callable[[], Tensor]) -> tuple[Tensor, list[_Call]]:
        return _record(self.model, run)

    def _refuse(self, what: str, off: float, culprit: str | None) -> None:
        hooked = [p for p in self.replaced if p == culprit or p.startswith(f"{culprit}.")]
        culprit = hooked[0] if hooked else culprit
        where = f"{culprit} ({self._about(culprit)})" if culprit else "the model's own method"
        when = ""
        if self.moved:
            mine = [path for path in self.moved if path.startswith(f"{culprit}.")]
            when = f" as soon as {(mine or self.moved)[0]}, which is not read, has other values"
        raise KindError(
            f"{OP}: model must encode {what} as its plain tower with the same weights does; got "
            f"features that are {off:.1%} off{when}, because of {where}; {CURE}"
        )

    def _about(self, path: str) -> str:
        part = self.model.get_submodule(path)
        facts = [type(part).__name__]
        facts += ["with hooks"] * any(getattr(part, kind) for kind in _FORWARD_HOOKS)
        facts += ["its forward is replaced"] * ("forward" in vars(part))
        return ", ".join(facts)


class _Watched:
    """A hook, and a note where it has replaced what passed."""

    def __init__(self, hook: Callable[..., Any], path: str, replaced: list[str]) -> None:
        self._hook, self._path, self._replaced = hook, path, replaced

    def __call__(self, module: nn.Module, *passed: Any) -> Any:
        result = self._hook(module, *passed)
        if result is not None and not any(result is one for one in passed):
            self._replaced.append(self._path)
        return result


@dataclass(frozen=True)
class _Call:
    """The first call of a module in a pass."""

    path: str
    given: Tensor | None
    output: Tensor

    def differs(self, expected: Callable[[Tensor], Tensor], off: float) -> bool:
        """Tell whether a module gave something else than it should have given."""
        if self.given is None:
            return False
        try:
            want = expected(self.given)
        except RuntimeError:  # called otherwise than the plain module is
            return False
        return not _distance(want, self.output) <= off


def _record(root: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[_Call]]:
    """Run a pass and give what its modules did, inner ones first."""
    seen: dict[str, _Call] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if isinstance(output, Tensor) and output.is_floating_point() and path not in seen:
                seen[path] = _Call(path, given, output)

        return hook

    handles = [
        part.register_forward_hook(note(path), with_kwargs=True)
        for path, part in root.named_modules()
    ]
    try:
        return run(), list(seen.values())
    finally:
        for handle in handles:
            handle.remove()


def _distance(a: Tensor, b: Tensor) -> float:
    """Give the largest distance of two rows as a share of their length; NaN if it is none."""
    if a.shape != b.shape:
        return float("inf")
    wide = [x.to("cpu", torch.float64) for x in (a, b)]
    off = (wide[0] - wide[1]).norm(dim=-1) / wide[1].norm(dim=-1).clamp_min(1e-30)
    return float(off.max())


def _image_sides(model: Any) -> dict[str, nn.Module]:
    """Give the modules that an `ImageTower` is made of, by their names in it."""
    if hasattr(model, "vision_model"):
        return {"model": model.vision_model, "projection": model.visual_projection}
    return {"": model.visual}


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    own = (getattr(part, "weight", None), getattr(part, "bias", None))
    return [t for t in own if isinstance(t, Tensor)]


# --- what the parts of a text tower should do, to name the one that does not ----------------------


def _plain_parts(
    model: Any, family: Family, tower: TextTower
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Give by its path what a part should do to the first tensor that it is given."""
    plain: dict[str, Callable[[Tensor], Tensor]] = {}
    for path, part in model.named_modules():
        if isinstance(part, nn.LayerNorm):
            plain[path] = functools.partial(_norm, part)
        elif isinstance(part, nn.Linear):
            plain[path] = functools.partial(_linear, part)
        elif isinstance(part, nn.Embedding):
            plain[path] = functools.partial(_embed, part)
    names = {id(part): path for path, part in model.named_modules()}
    for read, block in zip(tower.blocks, text_blocks(model, family), strict=True):
        path = names[id(block)]
        attn = "self_attn" if family == "transformers" else "attn"
        plain[f"{path}.{attn}"] = functools.partial(_attend, tower, read)
        plain[f"{path}.mlp"] = functools.partial(_perceive, tower, read)
        plain[path] = functools.partial(_pass, tower, read)
    return plain


def _norm(part: Any, x: Tensor) -> Tensor:
    bias = torch.zeros_like(part.weight) if part.bias is None else part.bias
    return block_norm(x, part.weight, bias, part.eps)


def _linear(part: Any, x: Tensor) -> Tensor:
    return F.linear(x, part.weight, part.bias)


def _embed(part: Any, x: Tensor) -> Tensor:
    return F.embedding(x, part.weight)


def _attend(tower: TextTower, block: Block, x: Tensor) -> Tensor:
    # OpenAI's blocks take (L, B, W)
    rows = x if x.shape[1] == tower.context_length else x.transpose(0, 1)
    qkv = F.linear(rows, block.qkv_w, block.qkv_b)
    q, k, v = (t.unflatten(-1, (tower.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tower.causal)
    out = F.linear(mixed.transpose(1, 2).flatten(2), block.out_w, block.out_b)
    return out if rows is x else out.transpose(0, 1)


def _perceive(tower: TextTower, block: Block, x: Tensor) -> Tensor:
    h = activate(F.linear(x, block.fc_w, block.fc_b), tower.activation)
    return F.linear(h, block.proj_w, block.proj_b)


def _pass(tower: TextTower, block: Block, x: Tensor) -> Tensor:
    x = x + _attend(tower, block, block_norm(x, block.ln_1_w, block.ln_1_b, tower.eps))
    return x + _perceive(tower, block, block_norm(x, block.ln_2_w, block.ln_2_b, tower.eps))
