"""YAML as people write settings: small, without tags, and read in bounded time and memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fastfpl.errors import InputError, Missing, cut

__all__ = ["parse_yaml", "read_yaml"]

_MOST_BYTES = 1 << 20
_MOST_DEPTH = 32
# values after every alias is written out
_MOST_VALUES = 10_000
_MOST_DIGITS = 100

# YAML 1.1 wants a point and a signed exponent, and no sign before a point; people do not
_NUMBER = re.compile(r"^(?:[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[-+]\.[0-9]+)$")
_FLOAT, _INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"


class _Refused(Exception):
    """The rule that was broken, and what came."""


class _Loader(yaml.SafeLoader):
    """Refuses what no settings need: tags, keys said twice, deep or multiplying structures."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and count what it holds, its aliases written out."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            _refuse("no tags", event.tag, event.start_mark)
        if self._depth == _MOST_DEPTH:
            _refuse(
                f"at most {_MOST_DEPTH} values inside each other", "deeper ones", event.start_mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
        if (
            isinstance(node, yaml.ScalarNode)
            and node.tag in (_INT, _FLOAT)
            and len(node.value) > _MOST_DIGITS
        ):
            _refuse(f"numbers of at most {_MOST_DIGITS} digits", "a longer one", node.start_mark)
        if node is not None:
            self._sizes[node] = self._size(node, event)
        return node

    def _size(self, node: yaml.Node, event: yaml.Event) -> int:
        if isinstance(event, yaml.AliasEvent) and node not in self._sizes:
            _refuse("no value inside itself", f"*{event.anchor}", event.start_mark)
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
        size = 1 + sum(self._sizes[part] for part in parts)
        if size > _MOST_VALUES:
            _refuse(f"at most {_MOST_VALUES} values, aliases written out", "more", node.start_mark)
        return size


_Loader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+.0123456789"))


def _refuse(rule: str, got: str, mark: Any) -> NoReturn:
    raise _Refused(f"{rule}; got {cut(got)} in line {mark.line + 1}")


def _refuse_twice(node: yaml.MappingNode) -> None:
    """Refuse a key that a mapping says twice; of keys that come by ``<<`` its own win."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                _refuse("every key once", key.value, key.start_mark)
            seen.add((key.tag, key.value))


def parse_yaml(text: str, rule: str) -> Any:
    """Read one value from YAML.

    Parameters
    ----------
    text : str
    rule : str
        Who asks and what must be YAML, as a sentence's first half: ``"fastfpl.Settings: a.yaml"``.

    Raises
    ------
    InputError
        If it is no YAML; holds a tag, a key twice in one mapping, or a value inside itself; or is
        longer than 1 MiB, nested more than 32 deep, or more than 10 000 values with every alias
        written out.
    """
    if len(text) > _MOST_BYTES:
        raise InputError(f"{rule} must hold at most {_MOST_BYTES} characters; got {len(text)}")
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except _Refused as refused:
        raise InputError(f"{rule} must hold {refused}") from None
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date with 13 months
        line = " ".join(str(error).split())
        raise InputError(f"{rule} must be YAML; got {cut(line, 300)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path, op: str) -> Any:
    """Read one value from a file of YAML, in UTF-8; see `parse_yaml`."""
    try:
        if not path.is_file():
            raise Missing(f"{op}: the file must exist; got {path}")
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        if isinstance(error, Missing):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{op}: the file must be readable; got {cut(str(path))!r}: {reason}"
        ) from None
    if len(raw) > _MOST_BYTES:
        raise InputError(f"{op}: {path} must hold at most {_MOST_BYTES} bytes; got more")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{op}: {path} must be UTF-8; got the byte 0x{raw[error.start]:02X} in line {line}; "
            "save it as UTF-8"
        ) from None
    return parse_yaml(text, f"{op}: {path}")
