"""A file that lists images with their labels: CSV, TSV, JSON lines or parquet."""

from __future__ import annotations

import csv
import importlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fastfpl.data.base import Dataset
from fastfpl.data.catalogue import open_root
from fastfpl.data.folders import kind_of
from fastfpl.data.layouts import SPLITS, part_of
from fastfpl.data.listing import Item, check_items
from fastfpl.data.names import flaw, tidy
from fastfpl.data.own_lists import Record, assemble, counted, few, own_facts, read_names
from fastfpl.data.texts import slashed
from fastfpl.data.trees import File, file_of
from fastfpl.errors import Damaged, InputError, Missing, near, shown

__all__ = ["COLUMNS", "MANIFESTS", "check_columns", "from_manifest"]

#: What a manifest says of an image; the first two it must say.
COLUMNS = ("path", "label", "domain", "client", "split")
_NEEDED = COLUMNS[:2]
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
#: What the name of a manifest ends with.
MANIFESTS = (*_DELIMITERS, *_LINES, ".parquet")
# letters of a cell; longer ones are no path and no name
_LONGEST = 4096
# places in memory are cheap, sentences about the millionth row are not read
_ROWS = 50_000_000


def from_manifest(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    root: str | Path | None = None,
    digest: Literal["time", "content"] = "time",
) -> Dataset:
    """Read a list of images: a row an image, with its path, its label, and what else is known.

    Parameters
    ----------
    path : path
        A file ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson`` or, where pyarrow or pandas is there,
        ``.parquet``. Columns ``path`` and ``label`` must be there; ``domain``, ``client`` and
        ``split`` (train, val, test) may be. An empty client of a test image gives it to all.
    columns : mapping, optional
        What the file calls them: ``{"path": "file", "label": "kind"}``.
    root : path, optional
        Folder that paths are relative to and must lie in; the manifest's own by default.
    digest : "time" or "content"
        As for `from_folder`.

    Returns
    -------
    Dataset
        Class names are the labels, or what ``classes.json`` or ``classes.txt`` beside the manifest
        say, which labels that are numbers need. Splits as for `from_folder`.

    Raises
    ------
    Missing
        If the manifest or an image is not there, or a package that reads it.
    InputError
        If an argument is refused.
    Damaged
        If a row lacks something, contradicts another one or names a path outside the folder, or
        the list makes no data set; the sentence names the row.
    """
    facts = own_facts("manifest")
    op = facts.op
    if digest not in ("time", "content"):
        raise InputError(f'{op}: digest must be "time" or "content"; got {shown(digest)}')
    file = open_root(op, path)
    if kind_of(file) != "a file":
        cure = f": write folder:{file}" if kind_of(file) == "a folder" else ""
        raise Missing(f"{op}: path must be a file; got {file} ({kind_of(file)}){cure}")
    base = file.parent if root is None else open_root(op, root)
    named = check_columns(op, columns or {})
    rows = _rows(op, file)
    first = next(rows, None)
    if first is None:
        raise Damaged(f"{op}: {file} must list an image; got no row")
    _has_columns(op, file, named, first[1])
    records: dict[str, Record] = {}
    for number, row in _chain(first, rows):
        record = _record(op, file, number, row, named)
        before = records.get(record.path)
        if before is not None:
            same = before == record
            raise Damaged(
                f"{op}: {file} must list an image once; got {shown(record.path)} again in row "
                f"{number}{'' if same else ', with something else said of it'}"
            )
        records[record.path] = record
        if len(records) > _ROWS:
            raise Damaged(f"{op}: {file} must list at most {_ROWS} images; got more")
    # outside the folder nothing is looked at, not even whether it is there
    check_items(facts, "manifest's", [Item(p, 0) for p in records], 1, rows=True)
    found = [
        record._replace(file=_measured(op, file, base, record.path, digest == "content"))
        for record in records.values()
    ]
    labels = sorted({record.label for record in found})
    names = read_names(op, lambda name: _beside(file.parent / name), labels)
    said = [counted(len(labels), "class", "classes")]
    for what in ("domain", "client"):
        values = sorted({getattr(record, what) for record in found} - {""})
        if values:
            said.append(f"{counted(len(values), what)} ({few(values)})")
    if any(record.domain for record in found) and not all(record.domain for record in found):
        gap = next(record.path for record in found if not record.domain)
        raise Damaged(
            f"{op}: every image of {file} must name its domain where one does; got none for "
            f"{shown(gap)}"
        )
    notes = [f"{counted(len(found), 'image')}: {', '.join(said)}"]
    return assemble(facts, tidy(file.stem) or "images", base, tidy(file), found, names, notes)


def check_columns(op: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return what a manifest calls its columns, or refuse a name that is none of `COLUMNS`."""
    for key, value in columns.items():
        if key not in COLUMNS:
            raise InputError(
                f"{op}: columns must rename {', '.join(COLUMNS)}; got {shown(key)}"
                + near(str(key), COLUMNS)
            )
        if not isinstance(value, str) or not value:
            raise InputError(f"{op}: column {key} must be a name; got {shown(value)}")
    return {name: columns.get(name, name) for name in COLUMNS}


def _chain(
    first: tuple[int, dict[str, str]], rest: Iterable[tuple[int, dict[str, str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    yield first
    yield from rest


def _has_columns(op: str, file: Path, named: Mapping[str, str], row: Mapping[str, str]) -> None:
    for name in COLUMNS:
        asked = named[name] != name
        if named[name] not in row and (name in _NEEDED or asked):
            cure = "" if asked else f": name yours by columns (--columns {name}=...)"
            other = _other_delimiter(file, row)
            if other:
                cure = f": separate cells by {_DELIMITERS[file.suffix.lower()]!r}, not by {other!r}"
            raise Damaged(
                f"{op}: {file} must have a column {named[name]!r}; got {few(sorted(row), 12)}{cure}"
            )


def _other_delimiter(file: Path, row: Mapping[str, str]) -> str:
    """Return what separates the cells of a table in place of what should; empty if nothing does.

    Spreadsheets write semicolons where the comma is the decimal mark.
    """
    if file.suffix.lower() not in _DELIMITERS or len(row) > 1:
        return ""
    (title,) = row
    return next((mark for mark in (";", "\t", ",", "|") if mark in title), "")


def _record(
    op: str, file: Path, number: int, row: Mapping[str, str], named: Mapping[str, str]
) -> Record:
    values = {name: row.get(named[name], "").strip() for name in COLUMNS}
    for name in _NEEDED:
        if not values[name]:
            raise Damaged(f"{op}: row {number} of {file} must have a {name}; got none")
    for name in COLUMNS[1:]:
        if flaw(values[name]):
            raise Damaged(
                f"{op}: row {number} of {file} must hold text that can be seen; got "
                f"{shown(values[name])} with {flaw(values[name])}"
            )
        values[name] = unicodedata.normalize("NFC", values[name])
    split = part_of(values["split"])
    if values["split"] and split is None:
        raise Damaged(
            f"{op}: the split of row {number} of {file} must be one of {', '.join(SPLITS)}; got "
            f"{shown(values['split'])}"
        )
    path = slashed(values["path"]).removeprefix("./")
    return Record(
        path, File(0, ""), values["label"], split or "", values["domain"], values["client"]
    )


def _measured(op: str, file: Path, base: Path, path: str, content: bool) -> File:
    kind = kind_of(base / path)
    if kind != "a file":
        raise Missing(
            f"{op}: images of {file} must be there; got {base / path} ({kind}): mend the path, or "
            "name the folder that paths are relative to by root (--root)"
        )
    return file_of(op, base / path, content=content)


def _beside(path: Path) -> bytes | None:
    return path.read_bytes() if kind_of(path) == "a file" else None


def _rows(op: str, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a manifest with their numbers, from 1."""
    suffix = file.suffix.lower()
    if suffix in _DELIMITERS:
        return _of_csv(op, file, _DELIMITERS[suffix])
    if suffix in _LINES:
        return _of_lines(op, file)
    if suffix == ".parquet":
        return _of_parquet(op, file)
    raise InputError(f"{op}: path must end with {', '.join(MANIFESTS)}; got {file.name}")


def _of_csv(op: str, file: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        # Windows marks what it writes as UTF-8 by a first character of its own
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = [title.strip() for title in next(reader, [])]
            if len(set(header)) < len(header):
                twice = next(title for title in header if header.count(title) > 1)
                raise Damaged(f"{op}: columns of {file} must differ; got {shown(twice)} twice")
            number = 0
            for row in reader:
                if not row:
                    continue
                number += 1
                if len(row) != len(header):
                    raise Damaged(
                        f"{op}: row {number} of {file} must have {len(header)} cells as its first "
                        f"line has; got {len(row)}: quote what holds a comma"
                    )
                yield number, dict(zip(header, row, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Damaged(
            f"{op}: {file} must be a table in UTF-8; got {tidy(error)}: save it as CSV in UTF-8"
        ) from error


def _of_lines(op: str, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open(file, encoding="utf-8-sig") as lines:
            number = 0
            for line in lines:
                if not line.strip():
                    continue
                number += 1
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise Damaged(
                        f"{op}: row {number} of {file} must be JSON; got {tidy(error)}"
                    ) from error
                if not isinstance(row, dict):
                    raise Damaged(
                        f"{op}: row {number} of {file} must be a JSON object; got {shown(row)}"
                    )
                yield number, {key: _text(op, file, number, row[key]) for key in row}
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{op}: {file} must be text in UTF-8; got {tidy(error)}") from error


def _of_parquet(op: str, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for package, read in (("pyarrow.parquet", _by_pyarrow), ("pandas", _by_pandas)):
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        try:
            rows = read(module, file)
        except ImportError:  # pandas reads by other packages
            continue
        except Exception as error:  # of any kind, on broken bytes
            raise Damaged(f"{op}: {file} must be parquet; got {tidy(error)}") from error
        for number, row in enumerate(rows, 1):
            yield number, {str(k): _text(op, file, number, v) for k, v in row.items()}
        return
    raise Missing(
        f"{op}: pyarrow, or pandas with fastparquet, must be there to read {file.name}; got "
        "neither: pip install pyarrow, or write the manifest as .csv"
    )


def _by_pyarrow(module: Any, file: Path) -> list[dict[str, Any]]:
    return module.read_table(file).to_pylist()  # type: ignore[no-any-return]


def _by_pandas(module: Any, file: Path) -> list[dict[str, Any]]:
    return module.read_parquet(file).to_dict("records")  # type: ignore[no-any-return]


def _text(op: str, file: Path, number: int, value: Any) -> str:
    """Write a cell as text; numbers that are labels or clients as they were, nothing as empty."""
    value = getattr(value, "item", lambda: value)()  # of numpy
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers beside gaps become such in pandas
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    text = str(value)
    if len(text) > _LONGEST:
        raise Damaged(
            f"{op}: a cell of row {number} of {file} must have at most {_LONGEST} letters; got "
            f"{len(text)}"
        )
    return text
