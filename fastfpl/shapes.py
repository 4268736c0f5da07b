"""The letters of sizes, and one check that binds them.

U clients, B images, C classes, E prompt experts, N prompts per class, T context tokens,
W text width, D joint width, H heads, P patches, L tokens of a full prompt (77).
"""

from __future__ import annotations

from typing import Protocol

from fastfpl.errors import InputError

__all__ = ["check_shapes"]


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shapes(
    op: str, _sizes: dict[str, int] | None = None, /, **arguments: tuple[_Shaped, str]
) -> dict[str, int]:
    """Check tensors against shapes written in letters and return each letter's size.

    Parameters
    ----------
    op : str
        Name that begins the error, e.g. ``"fastfpl.ops.gate_experts"``.
    _sizes : dict, optional
        Letters that are already bound.
    **arguments : (tensor, str)
        A shape such as ``"... B D"``; a leading ``...`` admits any leading dimensions, a number
        stands for itself. Equal letters must have equal sizes over all arguments.

    Raises
    ------
    InputError
        The sentence names the argument, the expected shape, what came, and the bound letters.
    """
    sizes: dict[str, int] = dict(_sizes or {})
    for name, (tensor, pattern) in arguments.items():
        letters = pattern.split()
        got = tuple(tensor.shape)
        free = letters[:1] == ["..."]
        fixed = letters[1:] if free else letters
        tail = got[len(got) - len(fixed) :] if fixed else ()
        good = len(got) >= len(fixed) if free else len(got) == len(fixed)
        if good:
            for letter, size in zip(fixed, tail, strict=True):
                want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                good &= want == size
        if not good:
            bound = ", ".join(f"{k}={v}" for k, v in sizes.items())
            raise InputError(
                f"{op}: {name} must have shape ({', '.join(letters)}); got {got}"
                + (f" with {bound}" if bound else "")
            )
    return sizes
