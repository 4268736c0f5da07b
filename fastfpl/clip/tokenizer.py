"""One face for the tokenizers of open_clip, OpenAI's clip and transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastfpl.errors import InputError, KindError

__all__ = ["Tokenizer", "adapt_tokenizer"]

CLIP_VOCABULARY = 49408
OP = "fastfpl.load_clip"


@dataclass(frozen=True)
class Tokenizer:
    """What the library needs of a tokenizer: raw ids of a text, and the ids around them.

    Attributes
    ----------
    sos : int or None
        Begins every prompt; None where nothing does.
    eot : int
        Ends every prompt.
    encode : callable
        A text -> its ids. A text that begins with a space is tokenised as behind a word.
    pad : int or None
        Fills a prompt behind its end; None where the tokenizer has none.
    """

    sos: int | None
    eot: int
    encode: Callable[[str], list[int]]
    pad: int | None = 0


# classes, not closures: a CLIP goes to another process with its tokenizer


@dataclass(frozen=True)
class _Plain:
    """A tokenizer whose ``encode`` adds nothing."""

    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))


@dataclass(frozen=True)
class _Bare:
    """A tokenizer of transformers without its special tokens, behind open_clip's cleaning."""

    tokenizer: Any
    clean: Callable[[str], str] | None = None

    def __call__(self, text: str) -> list[int]:
        if self.clean is not None:
            # cleaning strips the space that says: behind a word
            text = (" " if text[:1].isspace() else "") + self.clean(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class _Inside:
    """What the rows of a function hold between what begins and what ends a text."""

    tokenizer: Any
    begin: int
    end: int
    pad: int

    def __call__(self, text: str) -> list[int]:
        row = _strip(_row(self.tokenizer, text), self.pad)
        return row[self.begin : len(row) - self.end]


def adapt_tokenizer(tokenizer: Any, vocabulary: int) -> Tokenizer:
    """Recognise a tokenizer by what it can do; None is CLIP's own, for its own vocabulary."""
    if tokenizer is None:
        if vocabulary != CLIP_VOCABULARY:
            raise InputError(
                f"{OP}: tokenizer must be given for a vocabulary that is not CLIP's "
                f"{CLIP_VOCABULARY} tokens; got None with {vocabulary} tokens"
            )
        tokenizer = _clip_tokenizer()
    found = _recognise(tokenizer)
    around = [found.eot] if found.sos is None else [found.sos, found.eot]
    if not all(0 <= id < vocabulary for id in around):
        raise InputError(
            f"{OP}: tokenizer must stay inside the model's vocabulary; got start and "
            f"end ids {' and '.join(map(str, around))} with {vocabulary} tokens"
        )
    return found


@functools.lru_cache(maxsize=1)
def _clip_tokenizer() -> Any:
    """CLIP's own; reading its merges takes longer than converting a small model."""
    import open_clip

    return open_clip.SimpleTokenizer()


def _recognise(tokenizer: Any) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    # open_clip's HFTokenizer and transformers' processors keep the real one inside
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and hasattr(inner, "eos_token_id"):
        if hasattr(tokenizer, "context_length") and callable(tokenizer):
            return _wrapped(tokenizer, inner)
        return _hugging_face(inner)
    if hasattr(tokenizer, "bos_token_id") and hasattr(tokenizer, "eos_token_id"):
        return _hugging_face(tokenizer)
    if hasattr(tokenizer, "encode") and isinstance(getattr(tokenizer, "encoder", None), dict):
        known = tokenizer.encoder
        for sos, eot in (
            ("<start_of_text>", "<end_of_text>"),
            ("<|startoftext|>", "<|endoftext|>"),
        ):
            if sos in known and eot in known:
                return Tokenizer(known[sos], known[eot], _Plain(tokenizer))
    if callable(tokenizer):
        return _rows(tokenizer)
    raise KindError(
        f"{OP}: tokenizer must be open_clip's, OpenAI's or transformers', or a "
        f"function from texts to rows of ids; got {type(tokenizer).__name__}"
    )


def _row(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer([text])[0]]


def _strip(row: list[int], pad: int) -> list[int]:
    """Leave out the pads behind a row."""
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return row[:end]


def _rows(tokenizer: Any) -> Tokenizer:
    """Learn from a function such as ``clip.tokenize`` what stands around a text's ids."""
    empty = _row(tokenizer, "")
    pad = empty[-1]
    frame, full = _strip(empty, pad), _strip(_row(tokenizer, "a"), pad)
    begin = 0
    while begin < min(len(frame), len(full)) and frame[begin] == full[begin]:
        begin += 1
    # what ends a text may be the pad itself (SigLIP): then nothing of it is left here
    end = frame[begin:]
    if begin > 1 or len(end) > 1 or full[len(full) - len(end) :] != end:
        raise InputError(
            f"{OP}: tokenizer must put at most one id before a text and one behind it; got the "
            f"row {empty[:6]} for an empty text"
        )
    encode = _Inside(tokenizer, begin, len(end), pad)
    return Tokenizer(frame[0] if begin else None, end[0] if end else pad, encode, pad)


def _wrapped(tokenizer: Any, inner: Any) -> Tokenizer:
    """Take open_clip's HFTokenizer: what surrounds a text is what its rows show."""
    around = _rows(tokenizer)
    encode = _Bare(inner, getattr(tokenizer, "clean_fn", None))
    for text in ("a", "Two-Tone cats, 3."):
        if around.encode(text) != encode(text):
            raise InputError(
                f"{OP}: tokenizer must give a text the ids that its own inner tokenizer gives; got "
                f"{around.encode(text)} and {encode(text)} for {text!r}"
            )
    return Tokenizer(around.sos, around.eot, encode, around.pad)


def _hugging_face(tokenizer: Any) -> Tokenizer:
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    begin = len(full) - len(plain) - 1
    if begin not in (0, 1) or full[begin:-1] != plain:
        raise InputError(
            f"{OP}: tokenizer must put at most one id before a text and one behind it; got {full} "
            f"around {plain}"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    return Tokenizer(
        full[0] if begin else None,
        full[-1],
        _Bare(tokenizer),
        None if pad is None else int(pad),
    )
