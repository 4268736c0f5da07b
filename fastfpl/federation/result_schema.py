"""What ``result.json`` may hold: whoever reads one trusts its shape, types and sizes."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["MOST_BYTES", "Row", "parse_result"]

#: Largest file that is read; a thousand clients in a thousand rounds fill a fifth of it.
MOST_BYTES = 1 << 28
_DEEPEST = 32
_LARGEST = 1 << 63

_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0, lt=_LARGEST)]
_Amount = Annotated[float, Field(ge=0, le=1e15)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Text = Annotated[str, Field(max_length=10_000)]


class _Part(BaseModel):
    # later versions may say more; nothing reads what is not named here as it is
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class _Exam(_Part):
    accuracy: _Share
    macro_f1: _Share
    clients: list[_Share | None] = Field(min_length=1)
    domains: dict[_Name, _Share]


class _Merge(_Part):
    used: list[_Count]
    norms: dict[_Name, Annotated[float, Field(ge=0)]] = {}


class Row(_Part):
    """A row of ``rounds``."""

    round: _Count
    accuracy: _Share | None
    clients: list[_Share | None]
    exams: dict[_Name, _Exam]
    selected: list[_Count]
    lost: list[_Count]
    loss: float | None
    seconds: _Amount
    images_per_second: _Amount
    bytes_up: _Count
    bytes_down: _Count
    epsilon: _Amount | None = None
    merge: _Merge | None = None


class _Final(_Part):
    accuracy: _Share
    last5: _Share
    best: _Share
    std_over_clients: _Share
    macro_f1: _Share
    exams: dict[_Name, _Share] = Field(min_length=1)
    domains: dict[_Name, _Share]
    harmonic_mean: _Share | None = None


class _Settings(_Part):
    method: _Name
    seed: _Count
    dataset: Annotated[str, Field(min_length=1, max_length=5000)]  # a path, of own images
    partition: _Name
    rounds: Annotated[int, Field(ge=1, lt=_LARGEST)]
    shots: _Count | None
    augment: str = Field(pattern=r"^(none|fresh|views:[1-9][0-9]{0,8})$")
    crop: _Share
    flip: _Share
    options: dict[str, Any]
    as_released: list[_Name] = []


class _Deal(_Part):
    train: _Name
    test: _Name


class _Training(_Part):
    used: _Count
    there: _Count


class _Data(_Part):
    name: _Name
    classes: list[_Text] = Field(min_length=1)
    train_images: list[_Count] = Field(min_length=1)
    test_images: list[_Count] = Field(min_length=1)
    exams: dict[_Name, _Text] = Field(min_length=1)
    transductive: bool
    skipped: _Count
    notes: list[_Text]
    weights: _Text
    deal: _Deal | None = None
    training: _Training | None = None
    clients: list[_Name] | None = None
    others: _Count | None = None
    asked: list[_Count] | None = None
    population: _Count | None = None


class _Published(_Part):
    source: _Text
    cautions: list[_Text]
    where: list[_Text]
    figures: dict[_Name, Annotated[str, Field(max_length=40)]]


class _Preset(_Part):
    name: _Name
    about: _Text
    changed: dict[_Name, Annotated[list[Any], Field(min_length=2, max_length=2)]]
    published: list[_Published]


class _Flower(_Part):
    rules: dict[_Name, Any]
    version: _Text
    refused: _Count
    failed: _Count
    absent: _Count
    stays_with_clients: list[_Text]


class _Result(_Part):
    model_config = ConfigDict(extra="forbid")

    method: _Name
    settings: _Settings
    environment: dict[_Name, _Text | int | float | bool | None]
    faces: dict[_Name, list[_Name]]
    rounds: list[Row] = Field(min_length=1)
    final: _Final
    peak_memory_bytes: _Count
    data: _Data
    memory: dict[str, Any] | None = None
    preset: _Preset | None = None
    flower: _Flower | None = None

    @model_validator(mode="after")
    def _agree(self) -> _Result:
        clients, rows = len(self.data.test_images), self.rounds
        if len(self.data.train_images) != clients:
            raise ValueError(f"data must name the train_images of {clients} clients")
        if self.data.clients is not None and len(self.data.clients) != clients:
            raise ValueError(f"data must name {clients} clients, or none")
        if self.method != self.settings.method:
            raise ValueError("settings must name the method")
        if [row.round for row in rows] != list(range(len(rows))):
            raise ValueError("rounds must be numbered from 0")
        wanted = self.settings.rounds if any(row.selected for row in rows) else 1
        if len(rows) not in (wanted, self.settings.rounds):
            raise ValueError(f"rounds must be {wanted} where a run is finished; not {len(rows)}")
        exams = list(self.data.exams)
        # where clients came later, the headline is about these, and the others trained
        others = self.data.others or self.data.population or clients
        if self.data.asked is not None and len(self.data.asked) != clients:
            raise ValueError(f"data must name the {clients} clients that were asked")
        for row in rows:
            evaluated = exams if row.accuracy is not None else []
            if list(row.exams) != evaluated or bool(row.clients) != bool(evaluated):
                raise ValueError(f"round {row.round} must answer the exams of data, or none")
            if any(len(exam.clients) not in (clients, others) for exam in row.exams.values()) or (
                evaluated and len(row.clients) != clients
            ):
                raise ValueError(f"round {row.round} must have an accuracy of {clients} clients")
            answers = [exam.clients for exam in row.exams.values()]
            if evaluated and any(all(a is None for a in each) for each in answers):
                raise ValueError(f"round {row.round} must have the accuracy of a client")
            if any(client >= others for client in (*row.selected, *row.lost)):
                raise ValueError(f"round {row.round} must name clients from 0 to {others - 1}")
        if rows[-1].accuracy is None:
            raise ValueError("the last of the rounds must be evaluated")
        if list(self.final.exams) != exams:
            raise ValueError("final must have an accuracy of the exams of data")
        return self


def parse_result(text: str) -> dict[str, Any]:
    """Read the content of ``result.json``.

    Parameters
    ----------
    text : str

    Returns
    -------
    dict
        As it was written: types, ranges and lengths are those that `Result` names, numbers are
        finite.

    Raises
    ------
    ValueError
        With what was expected and what came.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"what is not JSON: {_short(str(error))}") from None
    _bounded(content)
    try:
        _Result.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(_short(str(part)) for part in first["loc"])
        rule = first["msg"].removeprefix("Value error, ")
        came = f"; got {_short(repr(first['input']))}" if where else ""
        raise ValueError(f"{where}: {rule[0].lower() + rule[1:]}{came}".lstrip(": ")) from None
    return content  # type: ignore[no-any-return]


def _bounded(content: Any) -> None:
    """Refuse what is nested too deeply, not finite or not writable again."""
    level = [content]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the number {value}")
            elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
                raise ValueError("a whole number of more than 64 bits")
        if not below:
            return
        level = below
    raise ValueError(f"JSON of more than {_DEEPEST} levels")


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
