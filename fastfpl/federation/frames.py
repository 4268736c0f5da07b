"""Results as tables of pandas, in long form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastfpl.data import short_name
from fastfpl.errors import Missing

if TYPE_CHECKING:
    import pandas

__all__ = ["frame_of"]

_OF_A_ROUND = ("loss", "seconds", "images_per_second", "bytes_up", "bytes_down", "epsilon")
_COLUMNS = ("method", "dataset", "seed", "round", "exam", "client", "figure", "value")


class _Played(Protocol):
    """What is asked of a `Result`, which imports this module."""

    @property
    def method(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def data(self) -> Mapping[str, Any]: ...
    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]: ...


def frame_of(results: Sequence[_Played]) -> pandas.DataFrame:
    """Lay results out in long form: a row a round, client and figure.

    Raises
    ------
    Missing
        If pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise Missing(
            "fastfpl.to_pandas: pandas must be installed; got none; "
            'run: pip install "fastfpl[pandas]"'
        ) from None
    frame = pandas.DataFrame([row for r in results for row in _rows(r)], columns=list(_COLUMNS))
    named = any(result.data.get("clients") for result in results)
    kinds = {"seed": "int64", "round": "int64", "value": "float64"}
    return frame.astype({**kinds, "client": "object" if named else "Int64"})


def _rows(result: _Played) -> Iterator[tuple[Any, ...]]:
    head = (result.method, short_name(result.settings["dataset"]), result.settings["seed"])
    names = result.data.get("clients")
    for row in result.rounds:
        at = (*head, row["round"])
        for key in _OF_A_ROUND:
            if row.get(key) is not None:
                yield (*at, None, None, key, row[key])
        for name, exam in row["exams"].items():
            for key in ("accuracy", "macro_f1"):
                yield (*at, name, None, key, exam[key])
            for domain, share in exam["domains"].items():
                yield (*at, name, None, f"accuracy on {domain}", share)
            for number, share in enumerate(exam["clients"]):
                if share is not None:
                    yield (*at, name, names[number] if names else number, "accuracy", share)
