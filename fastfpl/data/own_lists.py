"""From a person's own list of images to a data set: names, splits, domains, clients, refusals."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastfpl.data.base import Dataset
from fastfpl.data.catalogue import Facts, Need
from fastfpl.data.listing import Item, Listing, check_items, shuffled
from fastfpl.data.names import alike, both, flaw, readable, spelling, tidy
from fastfpl.data.trees import File
from fastfpl.errors import Damaged, near, shown

__all__ = [
    "PHOTOS",
    "Arranged",
    "Record",
    "arrange",
    "assemble",
    "counted",
    "few",
    "own_facts",
    "read_names",
]

#: The one domain of a set that names none.
PHOTOS = "photos"
# share of a class that is tested on where nobody says what is, as the sets in files have it
_TEST = 0.2
_NUMBER = re.compile(r"[0-9]+")


class Record(NamedTuple):
    """An image as a tree or a manifest names it; texts are empty where it says nothing.

    ``split`` is train, val, test or empty.
    """

    path: str
    file: File
    label: str
    split: str = ""
    domain: str = ""
    client: str = ""


def own_facts(kind: str) -> Facts:
    """Return the facts of a set that nobody published: ``kind`` made it, as ``from_kind``."""
    return Facts(
        name=kind,
        title="",
        folders=(),
        needs=(Need("", "your own copy"),),
        classes=0,
        train=0,
        test=0,
        protocol="",
        function=f"from_{kind}",
    )


class Arranged(NamedTuple):
    """Records in the order of their paths, and what their texts are numbers of.

    Attributes
    ----------
    labels, classnames, domains, clients : tuple of str
    train, test : list of Record
    notes : tuple of str
    """

    labels: tuple[str, ...]
    classnames: tuple[str, ...]
    domains: tuple[str, ...]
    clients: tuple[str, ...]
    train: list[Record]
    test: list[Record]
    notes: tuple[str, ...]

    def items(self, records: Sequence[Record]) -> list[Item]:
        """Return paths, labels and domains of records, by number."""
        label = {name: number for number, name in enumerate(self.labels)}
        domain = {name: number for number, name in enumerate(self.domains)}
        # a set without domains has one
        return [Item(r.path, label[r.label], domain.get(r.domain, 0)) for r in records]

    def clients_of(self, records: Sequence[Record]) -> list[int] | None:
        """Return the client of each record, -1 for all; None where the set names none."""
        client = {name: number for number, name in enumerate(self.clients)}
        return [client.get(record.client, -1) for record in records] if client else None


def arrange(
    op: str, where: str, records: Sequence[Record], names: Mapping[str, str], notes: Sequence[str]
) -> Arranged:
    """Find classes, splits, domains and clients of records.

    Parameters
    ----------
    op : str
        What an error begins with.
    where : str
        Names the tree or the manifest in errors.
    records : sequence of Record
    names : mapping from label to name
        What people would say; labels that are not in it are their own names. Where it holds one,
        it must hold all, and no other.
    notes : sequence of str

    Raises
    ------
    Damaged
        If there are fewer than two classes, a class or a client is not in training, two names are
        alike, or what is said of an image contradicts itself.
    """
    labels = tuple(sorted({record.label for record in records}))
    classnames = _classnames(op, where, labels, names)
    if len(labels) < 2:
        raise Damaged(
            f"{op}: {where} must hold images of at least two classes; got {len(labels)}"
            + (f", {shown(classnames[0])}" if labels else "")
        )
    notes = [*notes]
    parts = _split(op, where, records, notes)
    domains = tuple(sorted({record.domain for record in records}))
    clients = _in_order({record.client for record in records} - {""})
    _only_in_test(op, where, parts, clients)
    everyones = sum(not record.client for record in parts["test"]) if clients else 0
    if everyones:
        notes.append(f"{counted(everyones, 'test image')} of no client: asked of all of them")
    for what, group in (("domains", domains), ("clients", clients)):
        two = alike(group)
        if two is not None:
            raise Damaged(
                f"{op}: {what} of {where} must differ in more than capitals and forms of accents; "
                f"got {both(group[two[0]], group[two[1]])}: name them alike or apart"
            )
    return Arranged(
        labels,
        classnames,
        domains if domains != ("",) else (PHOTOS,),
        clients,
        parts["train"],
        parts["test"],
        tuple(notes),
    )


def assemble(
    facts: Facts,
    name: str,
    base: Path,
    where: str,
    records: Sequence[Record],
    names: Mapping[str, str],
    notes: Sequence[str],
    unpack: Callable[[str], bytes] | None = None,
) -> Dataset:
    """Make a data set of image files.

    Parameters
    ----------
    facts : Facts
        Of `own_facts`.
    name : str
        Of the data set.
    base : Path
        What paths are relative to.
    where, records, names, notes
        As for `arrange`, whose errors it raises.
    unpack : callable, optional
        As for `Listing`.
    """
    found = arrange(facts.op, where, records, names, notes)
    facts = replace(facts, domains=found.domains)
    splits = {}
    for part, mine in (("train", found.train), ("test", found.test)):
        items = found.items(mine)
        check_items(facts, part, items, len(found.labels))
        splits[part] = Listing(
            facts,
            base,
            items,
            [record.file.size for record in mine],
            marks=[record.file.mark for record in mine],
            clients=found.clients_of(mine),
            unpack=unpack,
        )
    return Dataset(
        name=name,
        classnames=found.classnames,
        domains=found.domains,
        train=splits["train"],
        test=splits["test"],
        notes=found.notes,
        clients=found.clients,
    )


def read_names(
    op: str, read: Callable[[str], bytes | None], labels: Sequence[str]
) -> dict[str, str]:
    """Read what people would call the labels: ``classes.json``, ``classes.txt``, or nothing.

    The first is an object from label to name; the second has a line a class, the label, white
    space, and the name; a label alone is its own name.

    Raises
    ------
    Damaged
        If both are there, or one is not what it must be.
    """
    found = {name: read(name) for name in ("classes.json", "classes.txt")}
    there = [name for name, content in found.items() if content is not None]
    if not there:
        return {}
    if len(there) > 1:
        raise Damaged(
            f"{op}: classes.json or classes.txt must name the classes; got both: remove one"
        )
    (file,) = there
    content = found[file] or b""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged(f"{op}: {file} must be text in UTF-8; got {tidy(error)}") from error
    pairs = _of_json(op, text) if file.endswith(".json") else _of_lines(op, text, labels)
    names: dict[str, str] = {}
    for label, name in pairs:
        key = unicodedata.normalize("NFC", label)
        if key in names:
            raise Damaged(f"{op}: {file} must name a class once; got {shown(label)} twice")
        names[key] = name
    return names


def few(names: Sequence[str], most: int = 6) -> str:
    """List names for a note, the first so many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(tidy(name) for name in names[:most]) + more


def counted(number: int, thing: str, things: str = "") -> str:
    """Count things: ``1 class``, ``3 classes``."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def _of_json(op: str, text: str) -> list[tuple[str, str]]:
    try:
        # as pairs, so that a label that stands twice shows
        pairs: Any = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{op}: classes.json must be JSON; got {tidy(error)}") from error
    if not isinstance(pairs, _Pairs) or not all(isinstance(name, str) for _, name in pairs):
        raise Damaged(
            f'{op}: classes.json must be an object from folder to name, as {{"n01440764": "tench"}}'
            f"; got {shown(pairs)}"
        )
    return list(pairs)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written."""


def _of_lines(op: str, text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    # a label may hold spaces itself: the longest one that a line begins with is meant
    known = sorted(labels, key=len, reverse=True)
    pairs = []
    for line in (unicodedata.normalize("NFC", raw.strip()) for raw in text.splitlines()):
        if not line:
            continue
        label, tab, name = line.partition("\t")
        if not tab:
            label = next(
                (k for k in known if line == k or (line.startswith(k) and line[len(k)].isspace())),
                line.split()[0],
            )
            name = line[len(label) :]
        pairs.append((label.strip(), name.strip() or label.strip()))
    return pairs


def _classnames(
    op: str, where: str, labels: Sequence[str], names: Mapping[str, str]
) -> tuple[str, ...]:
    """Give every label the name that people would say, or refuse those that have none."""
    for label in labels:
        if names and label not in names:
            raise Damaged(
                f"{op}: classes.json or classes.txt of {where} must name every class; got none for "
                f"{shown(label)}: add a line"
            )
    for label in names:
        if label not in labels:
            raise Damaged(
                f"{op}: classes.json or classes.txt of {where} must name classes that have images; "
                f"got {shown(label)}{near(label, labels)}: remove it, or add images"
            )
    if not names and all(_NUMBER.fullmatch(label) for label in labels):
        raise Damaged(
            f"{op}: classes of {where} must have names that people would say, for CLIP reads them; "
            f"got {few(labels)}: write them into classes.json beside the images, as "
            f'{{"{labels[0]}": "cat"}}'
        )
    found = tuple(unicodedata.normalize("NFC", readable(names.get(k, k))) for k in labels)
    for label, name in zip(labels, found, strict=True):
        if flaw(name) or not spelling(name):
            raise Damaged(
                f"{op}: class names of {where} must be text that can be seen; got {shown(name)} "
                f"for {shown(label)}: name it in classes.json"
            )
    two = alike(found)
    if two is not None:
        one, other = (labels[place] for place in two)
        raise Damaged(
            f"{op}: class names of {where} must differ to CLIP, which sees no capitals, "
            f"underscores or forms of accents; got {both(one, other)}: name them alike, or "
            "apart in classes.json"
        )
    return found


def _split(
    op: str, where: str, records: Sequence[Record], notes: list[str]
) -> dict[str, list[Record]]:
    """Say what is trained on and what is tested on; draw the latter where nobody says it."""
    parts: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.path):
        parts[record.split].append(record)
    if "" in parts and len(parts) > 1:
        raise Damaged(
            f"{op}: every image of {where} must be of a split, or none; got "
            f"{shown(parts[''][0].path)} of none"
        )
    if "" in parts:
        parts["train"] = parts.pop("")
    if "train" not in parts:
        raise Damaged(
            f"{op}: {where} must hold training images; got only those of {', '.join(sorted(parts))}"
        )
    if "test" in parts:
        if "val" in parts:
            notes.append(f"{counted(len(parts['val']), 'validation image')} are not used")
        return {"train": parts["train"], "test": parts["test"]}
    if "val" in parts:
        notes.append("no test split: tested on the validation images")
        return {"train": parts["train"], "test": parts["val"]}
    return _drawn(op, where, parts["train"], notes)


def _drawn(
    op: str, where: str, records: Sequence[Record], notes: list[str]
) -> dict[str, list[Record]]:
    groups: dict[tuple[str, str, str], dict[str, Record]] = defaultdict(dict)
    for record in records:
        groups[record.domain, record.client, record.label][record.path] = record
    drawn: set[str] = set()
    for mine in groups.values():
        mixed = shuffled(mine)
        number = max(round(_TEST * len(mixed)), 1) if len(mixed) > 1 else 0
        drawn.update(mixed[:number])
    if not drawn:
        raise Damaged(
            f"{op}: {where} must hold two images of a class (of one domain and client), of which "
            "one is tested on; got no two of any"
        )
    notes.append(
        "no test split: 80 % of the images of each class are trained on and 20 % are tested on, "
        "drawn here by their paths"
    )
    parts: dict[str, list[Record]] = {"train": [], "test": []}
    for record in records:
        parts["test" if record.path in drawn else "train"].append(record)
    return parts


def _only_in_test(
    op: str, where: str, parts: Mapping[str, Sequence[Record]], clients: Sequence[str]
) -> None:
    """Refuse classes, domains and clients that nobody could learn anything of."""
    for what, key in (("class", "label"), ("domain", "domain"), ("client", "client")):
        trained = {getattr(record, key) for record in parts["train"]}
        lost = sorted({getattr(record, key) for record in parts["test"]} - trained - {""})
        if lost:
            raise Damaged(
                f"{op}: {where} must hold training images of every {what}; got only test images of "
                f"{few([shown(name) for name in lost])}: add some, or leave it out"
            )
    if not clients:
        return
    shared = Counter(record.client for record in parts["train"])[""]
    if shared:
        first = next(record.path for record in parts["train"] if not record.client)
        raise Damaged(
            f"{op}: every training image of {where} must name its client where one does; got "
            f"{shared} without, the first is {shown(first)}"
        )


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Order clients' names: by number where all are numbers, else by code points."""
    if names and all(_NUMBER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
