"""One face for the tokenizers of open_clip, OpenAI's clip and transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastfpl.errors import InputError, KindError

__all__ = ["Tokenizer", "adapt_tokenizer"]

CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Tokenizer:
    """What the library needs of a tokenizer: raw ids of a text, and the ids around them."""

    sos: int
    eot: int
    encode: Callable[[str], list[int]]


def adapt_tokenizer(tokenizer: Any, vocabulary: int) -> Tokenizer:
    """Recognise a tokenizer by what it can do; None is CLIP's own, for its own vocabulary."""
    if tokenizer is None:
        if vocabulary != CLIP_VOCABULARY:
            raise InputError(
                "fastfpl.load_clip: tokenizer must be given for a vocabulary that is not CLIP's "
                f"{CLIP_VOCABULARY} tokens; got None with {vocabulary} tokens"
            )
        tokenizer = _clip_tokenizer()
    found = _recognise(tokenizer)
    if not 0 <= found.eot < vocabulary or not 0 <= found.sos < vocabulary:
        raise InputError(
            "fastfpl.load_clip: tokenizer must stay inside the model's vocabulary; got start and "
            f"end ids {found.sos} and {found.eot} with {vocabulary} tokens"
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
    if inner is not None and hasattr(inner, "bos_token_id"):
        clean = getattr(tokenizer, "clean_fn", None) or str
        return _hugging_face(inner, clean)
    if hasattr(tokenizer, "bos_token_id") and hasattr(tokenizer, "eos_token_id"):
        return _hugging_face(tokenizer, str)
    if hasattr(tokenizer, "encode") and isinstance(getattr(tokenizer, "encoder", None), dict):
        known = tokenizer.encoder
        for sos, eot in (
            ("<start_of_text>", "<end_of_text>"),
            ("<|startoftext|>", "<|endoftext|>"),
        ):
            if sos in known and eot in known:
                return Tokenizer(known[sos], known[eot], lambda text: list(tokenizer.encode(text)))
    if callable(tokenizer):  # clip.tokenize: rows of SOS, ids, EOT, zeros
        first, last = (int(i) for i in tokenizer([""])[0][:2])

        def encode(text: str) -> list[int]:
            row = [int(i) for i in tokenizer([text])[0]]
            return row[1 : row.index(last)]

        return Tokenizer(first, last, encode)
    raise KindError(
        "fastfpl.load_clip: tokenizer must be open_clip's, OpenAI's or transformers', or a "
        f"function from texts to rows of ids; got {type(tokenizer).__name__}"
    )


def _hugging_face(tokenizer: Any, clean: Callable[[str], str]) -> Tokenizer:
    sos, eot = tokenizer.bos_token_id, tokenizer.eos_token_id
    if sos is None or eot is None:
        raise InputError(
            "fastfpl.load_clip: tokenizer must have start and end tokens; got "
            f"bos_token_id {sos} and eos_token_id {eot}"
        )
    return Tokenizer(
        int(sos),
        int(eot),
        lambda text: list(tokenizer.encode(clean(text), add_special_tokens=False)),
    )
