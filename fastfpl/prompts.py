"""Class prompts: SOS, context, class name, ending, EOT; tokenised once, encoded many times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from fastfpl.data.names import both, flaw, readable, shown
from fastfpl.errors import InputError, KindError, near
from fastfpl.ops.memory import current_limit, memory_limit, parse_bytes
from fastfpl.ops.text import PromptLayout, TextTower, broadcast_deep, encode_text
from fastfpl.shapes import check_shapes

if TYPE_CHECKING:
    from fastfpl.clip import FrozenCLIP

__all__ = ["ClassPrompts", "Position", "encode_prompts"]

Position = Literal["end", "middle", "front"]


class _Word(NamedTuple):
    """Token ids of one class."""

    name: list[int]
    ending: list[int]


class ClassPrompts:
    """The prompts of a list of classes, tokenised once for one CLIP.

    Parameters
    ----------
    clip : FrozenCLIP
    names : sequence of str
        Class names as a person writes them; underscores and runs of white space become a space.
    position : "end", "middle" or "front"
        Where the class name stands: behind the context, after its first half, or before it.
    ending : str
        What follows the class name (or the context, if it stands last). It is tokenised together
        with the name.

    Attributes
    ----------
    names : tuple of str
        C names.
    tower : TextTower
        The frozen text weights.
    eot_spare : int
        Largest number of context vectors that every class leaves room for.

    Raises
    ------
    InputError
        If the list is empty, a name is empty or holds a character that cannot be seen, a name
        alone does not fit, or two names are equal or the same tokens to this CLIP.

    Notes
    -----
    Name and ending are one text to the tokenizer: the "?." of "pink-yellow dahlia?." is one token.
    Where a context comes between the two, as many ids stand before it as the name has alone; such
    a token goes with the name. A name behind a context is tokenised as behind a word, which is
    another token to some tokenizers (SigLIP 2).
    A prompt begins as the tower's do, with SOS or without, and a tower that is not causal sees the
    pads behind the EOT.
    Source: Zhou et al. 2022 (arXiv 2109.01134), equation 2 (end) and 3 (middle).
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        names: Sequence[str],
        position: Position = "end",
        ending: str = ".",
    ) -> None:
        op = "fastfpl.ClassPrompts"
        if isinstance(names, str):
            raise KindError(f"{op}: names must be a list of strings; got the string {names!r}")
        clean: list[str] = []
        for name in names:
            if not isinstance(name, str):
                raise KindError(f"{op}: names must be strings; got {name!r}")
            clean.append(readable(name))
            if not clean[-1]:
                raise InputError(f"{op}: names must not be empty; got {name!r} at {len(clean) - 1}")
            if flaw(clean[-1]):
                raise InputError(
                    f"{op}: names must be text that can be seen; got {shown(name)} with "
                    f"{flaw(clean[-1])}, at {len(clean) - 1}: write it without"
                )
        if not clean:
            raise InputError(f"{op}: names must hold at least one class; got none")
        twice = sorted(name for name, times in Counter(clean).items() if times > 1)
        if twice:
            raise InputError(f"{op}: names must be unique; got {twice[0]!r} more than once")
        if position not in get_args(Position):
            raise InputError(
                f"{op}: position must be a place of the name; got {position!r}"
                + near(str(position), get_args(Position))
            )
        self.names = tuple(clean)
        self.position: Position = position
        self.ending = ending
        self.tower: TextTower = clip.text
        self._clip = clip
        self._first, self._behind = self._split(""), self._split(" ")
        for words in (self._first, self._behind):
            self._tell_apart(words)
        usual = self._first if position == "front" else self._behind
        self.eot_spare = self._spare(usual)
        if self.eot_spare < 0:
            self._refuse(0, usual)
        self._layouts: dict[int, PromptLayout] = {}

    def _split(self, space: str) -> list[_Word]:
        """Tokenise name and ending of every class, a space in front or none."""
        whole = self._clip.tokenize([space + name + self.ending for name in self.names])
        alone = self._clip.tokenize([space + name for name in self.names])
        return [
            _Word(ids[: len(own)], ids[len(own) :]) for ids, own in zip(whole, alone, strict=True)
        ]

    def _spare(self, words: list[_Word]) -> int:
        taken = max(len(word.name) + len(word.ending) for word in words)
        return self.tower.context_length - self.tower.begin - 1 - taken

    def _tell_apart(self, words: list[_Word]) -> None:
        """Refuse names of no token, and two of the same tokens: one would score nothing."""
        seen: dict[tuple[int, ...], str] = {}
        for name, word in zip(self.names, words, strict=True):
            if not word.name:
                raise InputError(
                    f"fastfpl.ClassPrompts: names must hold a token; got {name!r}, of which this "
                    "CLIP's tokenizer keeps nothing: write it in words"
                )
            other = seen.setdefault((*word.name, *word.ending), name)
            if other != name:
                raise InputError(
                    "fastfpl.ClassPrompts: names must be different tokens to this CLIP; got "
                    f"{both(other, name)}, both tokens {shown([*word.name, *word.ending])}: "
                    "tell the two apart by a word"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ClassPrompts({len(self)} classes, position={self.position!r})"

    def _refuse(self, slots: int, words: list[_Word]) -> NoReturn:
        spare = self._spare(words)
        name, word = max(
            zip(self.names, words, strict=True), key=lambda pair: sum(map(len, pair[1]))
        )
        raise InputError(
            f"fastfpl.ClassPrompts: a prompt must fit into {self.tower.context_length} tokens; got "
            f"{len(word.name)} tokens of the name {name!r} + {slots} context vectors + "
            f"{len(word.ending)} of the ending + {'SOS and ' * self.tower.begin}EOT; "
            + (f"use at most {spare} vectors" if spare >= 0 else "shorten it")
        )

    def layout(self, slots: int) -> PromptLayout:
        """Return where every token stands with ``slots`` context vectors (cached)."""
        if slots not in self._layouts:
            lead = {"end": slots, "middle": slots // 2, "front": 0}[self.position]
            words = self._behind if lead else self._first
            if slots > self._spare(words):
                self._refuse(slots, words)
            self._layouts[slots] = self._lay_out(slots, lead, words)
        return self._layouts[slots]

    def _lay_out(self, slots: int, lead: int, words: list[_Word]) -> PromptLayout:
        count, tower = len(self), self.tower
        tokens = torch.zeros(count, tower.context_length, dtype=torch.int64)
        places = torch.zeros(count, slots, dtype=torch.int64)
        eot = torch.zeros(count, dtype=torch.int64)
        if tower.sos is not None:
            tokens[:, 0] = tower.sos
        for c, (ids, ending) in enumerate(words):
            start = tower.begin + lead
            tokens[c, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
            places[c, :lead] = torch.arange(tower.begin, start)
            places[c, lead:] = start + len(ids) + torch.arange(slots - lead)
            at = start + len(ids) + slots - lead
            last = [*ending, tower.eot]
            tokens[c, at : at + len(last)] = torch.tensor(last, dtype=torch.int64)
            tokens[c, at + len(last) :] = tower.pad
            eot[c] = at + len(last) - 1
        return PromptLayout(
            tokens=tokens.to(tower.device),
            slots=places.to(tower.device),
            eot=eot.to(tower.device),
            shared=tower.begin + lead,
            begin=tower.begin,
        )

    def with_ending(self, ending: str) -> ClassPrompts:
        """Return the prompts of the same classes with another ending, "" for none."""
        return ClassPrompts(self._clip, self.names, self.position, ending)

    def at(self, position: Position) -> ClassPrompts:
        """Return the prompts of the same classes with the name at another place."""
        if position == self.position:
            return self
        return ClassPrompts(self._clip, self.names, position, self.ending)

    def words(self, text: str) -> Tensor:
        """Return the token embeddings of ``text`` as a context: shape (tokens, W), a new tensor.

        ``words("a photo of a")`` as context gives zero-shot CLIP with the prompt
        "a photo of a {class}."; it also initialises learned contexts from words.
        """
        space = " " if self.position == "front" else ""
        ids = self._clip.tokenize([space + text])[0]
        return self.tower.token_embedding[ids].clone()


def encode_prompts(
    classes: ClassPrompts,
    ctx: Tensor,
    *,
    class_specific: bool = False,
    deep: Tensor | None = None,
    max_memory: int | str | None = None,
) -> Tensor:
    """Encode class prompts under learned contexts into unit-length text features.

    Parameters
    ----------
    classes : ClassPrompts
        C classes.
    ctx : Tensor, shape (..., T, W), or (..., C, T, W) if class_specific, floating point
        Context vectors; any leading dimensions are encoded in one pass.
    class_specific : bool
        Every class has its own context vectors. Shapes alone cannot tell (three clients or three
        classes), so it is said.
    deep : Tensor, shape (..., K, T, W), floating point, optional
        Deep prompts, which MaPLe and VPT learn for the layers behind the first: before layer i of
        1 to K (the first is 0) the states in the T slots of the context are replaced by
        ``deep[..., i - 1, :, :]``, without positions. A prompt depth of 9 has K = 8. Everything
        before K T W broadcasts to what ctx has before T W: (K, T, W) serves all contexts,
        (E, K, T, W) each of E experts, (..., C, K, T, W) each class, if class_specific.
    max_memory : int or str, optional
        What the activations of the pass may take: bytes, or a text such as ``"2GiB"``. Contexts,
        features and weights are not counted.

    Returns
    -------
    Tensor, shape (..., C, D), dtype of the tower
        Unit length over D. Under autocast in its dtype, unless the tower's projection has a bias.

    Raises
    ------
    InputError
        If the width or the number of classes disagrees, the prompt does not fit, ctx or deep is not
        finite, deep has other slots than ctx, more layers than the tower behind its first or does
        not broadcast, or max_memory is no positive number of bytes.
    KindError
        If ctx or deep is not a floating point tensor on the tower's device.

    Notes
    -----
    Differentiable in: ctx and deep. The check for finite values waits for the device; loops that
    cannot afford it call `fastfpl.ops.encode_text`.
    Source of deep prompts: Jia et al. 2022 (VPT, arXiv 2203.12119); in a text tower Khattak et al.
    2023 (MaPLe, arXiv 2210.03117), section 3.2.
    """
    op = "fastfpl.encode_prompts"
    if not isinstance(ctx, Tensor) or not ctx.is_floating_point():
        got = ctx.dtype if isinstance(ctx, Tensor) else type(ctx).__name__
        raise KindError(f"{op}: ctx must be a floating point tensor; got {got}")
    tower = classes.tower
    if class_specific:
        check_shapes(op, {"C": len(classes), "W": tower.width}, ctx=(ctx, "... C T W"))
    else:
        check_shapes(op, {"W": tower.width}, ctx=(ctx, "... T W"))
    _check_finite(op, "ctx", ctx)
    if deep is not None:
        deep = broadcast_deep(op, tower, deep, ctx.shape[:-2], ctx.shape[-2], "ctx")
        _check_finite(op, "deep", deep)
    limit = current_limit() if max_memory is None else parse_bytes(op, max_memory)
    layout = classes.layout(ctx.shape[-2])
    with memory_limit(limit):
        return encode_text(tower, layout, ctx, class_specific=class_specific, deep=deep)


def _check_finite(op: str, name: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor.detach())
    if not finite.all():
        first = tuple((~finite).nonzero()[0].tolist())
        raise InputError(f"{op}: {name} must be finite; got {tensor[first].item()} at {first}")
