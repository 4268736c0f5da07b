"""The rules of a networked run: how long is waited, and what is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastfpl.errors import InputError, cut, near, shown

__all__ = ["Rules", "make_rules"]


class Rules(BaseModel):
    """What the server decides beside the settings of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    quorum: float = Field(
        0.5, gt=0, le=1, description="share of the called clients whose answers must be there"
    )
    grace: float = Field(
        60.0, ge=0, le=1e6, description="seconds for the others once the quorum is there"
    )
    timeout: float = Field(
        600.0, gt=0, le=1e6, description="seconds after which a round waits for nobody"
    )
    patience: float = Field(
        1800.0,
        ge=0,
        le=1e8,
        description="seconds without a quorum, or before the first round without all clients, "
        "after which the run stops or begins with those that are there",
    )
    wire: Literal["exact", "float16", "bfloat16"] = Field(
        "exact", description="floats on the wire: as they are, or in 16 bits"
    )
    aggregation: Literal["plain", "secagg+"] = Field(
        "plain",
        description="uploads one by one, or by secure aggregation, which tells their mean alone",
    )
    secagg_clip: float = Field(
        8.0,
        gt=0,
        le=1e6,
        description="largest number that secure aggregation carries, in steps of a 2^21st of it",
    )
    most_norm: float = Field(
        1e4, gt=0, le=1e15, description="largest Euclidean norm of an array that is taken"
    )
    most_bytes: int = Field(
        1 << 28, ge=1, le=1 << 40, description="largest answer that is taken, in bytes of arrays"
    )

    def enough(self, called: int) -> int:
        """Say how many of the called clients are a quorum."""
        return max(1, math.ceil(self.quorum * called - 1e-9))


def make_rules(values: Mapping[str, Any]) -> Rules:
    """Check values and fill in defaults, or refuse with a sentence that names the key."""
    known = Rules.model_fields
    for key in values:
        if key not in known:
            raise InputError(
                f"fastfpl.flower: rule must be a known one; got {shown(key)}"
                + near(cut(str(key)), known)
            )
    clean: dict[str, Any] = {
        key: float(value) if type(value) is int and key not in ("most_bytes",) else value
        for key, value in values.items()
    }
    try:
        return Rules(**clean)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Value error, ")
        what = f"{key} is refused: " if key else ""
        raise InputError(
            f"fastfpl.flower: {what}{rule[0].lower() + rule[1:]}; "
            f"got {shown(first['input'] if key else dict(values))}"
        ) from None
