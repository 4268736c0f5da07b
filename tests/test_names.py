"""Names: what they may hold, which are one to a tokenizer, and at which doors they are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfpl.clip import load_clip
from fastfpl.data import load_dataset
from fastfpl.data.names import alike, flaw, readable, shown, tidy
from fastfpl.errors import Damaged, InputError
from fastfpl.prompts import ClassPrompts
from tests import trees

ALIKE = {
    "capitals": ("Cardigan", "cardigan"),
    "entity": ("fish & chips", "fish &amp; chips"),
    "entity of an entity": ("fish & chips", "fish &amp;amp; chips"),
    "accent": ("caf\u00e9", "cafe\u0301"),
    "apostrophe": ("colt's foot", "colt\u2019s foot"),
    "quotation marks": ('"yo" yo', "\u201cyo\u201d yo"),
}
UNSEEN = {
    "escape": ("a\x1b[31mb", "a control character, U+001B"),
    "nul": ("a\0b", "a control character, U+0000"),
    "other direction": ("a\u202eb", "an invisible character, U+202E"),
    "no width": ("a\u200bb", "an invisible character, U+200B"),
    "byte order": ("\ufeffa", "an invisible character, U+FEFF"),
    "surrogate": ("a\ud800", "half of a character, U+D800"),
}


class Ids:
    """A CLIP of which ClassPrompts needs the tokenizer and the text tower's sizes."""

    def __init__(self, tokenize: Any) -> None:
        self.text = load_clip("tiny").text
        self.tokenize = lambda texts: [tokenize(text) for text in texts]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", ALIKE)
def test_names_of_the_same_tokens_are_refused(kind: str, position: Any) -> None:
    one, other = ALIKE[kind]
    clip = load_clip("tiny")
    with pytest.raises(InputError, match="names must be different tokens to this CLIP") as caught:
        ClassPrompts(clip, ["a tree", one, "a house", other], position)
    text = str(caught.value)
    told = (ascii(one), ascii(other)) if kind == "accent" else (repr(one), repr(other))
    assert f"got {told[0]} and {told[1]}, both tokens [" in text
    assert text.endswith("tell the two apart by a word")
    assert len(ClassPrompts(clip, [one, f"{other} again"])) == 2
    # what the data side goes by is what the tokenizer does
    assert alike(["a tree", one, "a house", other]) == (1, 3)


def test_any_tokenizer_decides() -> None:
    def exact(text: str) -> list[int]:
        return [ord(c) % 40 for c in text]

    def unknown(text: str) -> list[int]:
        return [3 if word.isascii() else 2 for word in text.split()]

    def nothing(text: str) -> list[int]:
        return exact(text.replace("?", ""))

    assert len(ClassPrompts(Ids(exact), ["Cardigan", "cardigan"])) == 2  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got '猫' and '犬', both tokens \[2\]"):
        ClassPrompts(Ids(unknown), ["猫", "犬"], ending="")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"must hold a token; got '\?', of which .* keeps nothing"):
        ClassPrompts(Ids(nothing), ["cat", "?"])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", UNSEEN)
def test_prompts_refuse_what_cannot_be_seen(kind: str) -> None:
    name, why = UNSEEN[kind]
    with pytest.raises(InputError) as caught:
        ClassPrompts(load_clip("tiny"), ["cat", name])
    assert f"got {name!a} with {why}, at 1" in str(caught.value)
    assert str(caught.value).isprintable()


def test_white_space_is_a_space() -> None:
    assert ClassPrompts(load_clip("tiny"), ["sea\t\n horse", "cat"]).names == ("sea horse", "cat")


@pytest.mark.parametrize(
    "name",
    ["猫", "naïve", "\u0645\u06cc\u200c\u062e\u0648", "👩\u200d🚀", "St. John's wort", "½ m²"],
)
def test_names_of_people_stay(name: str) -> None:
    assert flaw(name) == ""
    assert readable(name) == name


@given(st.text())
def test_what_is_shown_can_be_seen(text: str) -> None:
    assert shown(text).isprintable()
    assert tidy(text).isprintable()
    assert len(shown(text * 200)) < 3000


def test_long_and_deep_values_are_cut() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, 10**4000, "x" * 10**6, [[["y" * 500] * 9] * 9] * 9):
        assert len(shown(value)) < 3000


# -- doors -----------------------------------------------------------------------------------


def renamed(root: Path, **changes: str) -> None:
    """Change class names of DTD's split, each given as its old name."""
    split = trees.dtd(root).split
    assert split is not None
    rows = json.loads(split.read_text())
    for part in rows.values():
        for row in part:
            row[2] = changes.get(row[2], row[2])
    split.write_text(json.dumps(rows))


@pytest.mark.parametrize("kind", ALIKE)
def test_a_split_with_two_names_that_are_one_to_clip_is_refused(kind: str, tmp_path: Path) -> None:
    one, other = ALIKE[kind]
    renamed(tmp_path, banded=one, zigzagged=other)
    with pytest.raises(Damaged, match=r"must differ to CLIP, .* for labels 0 and 2: tell"):
        load_dataset("dtd", tmp_path)


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_split_with_a_name_that_cannot_be_seen_is_refused(kind: str, tmp_path: Path) -> None:
    name, why = UNSEEN[kind]
    renamed(tmp_path, dotted=name)
    with pytest.raises(Damaged, match=r"names of .* must be text that can be seen") as caught:
        load_dataset("dtd", tmp_path)
    assert f"got {name!a} with {why} for label 1" in str(caught.value)
    assert str(caught.value).isprintable()


def test_cifar_with_two_names_that_are_one_to_clip_is_refused(tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10", names=("Truck", "frog", "truck"))
    with pytest.raises(Damaged, match="got 'Truck' and 'truck' for labels 0 and 2"):
        load_dataset("cifar10", tmp_path)


def test_folders_with_two_names_that_are_one_to_clip_are_refused(tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    (tree.folder / "images" / "dotted").rename(tree.folder / "images" / "Banded")
    with pytest.raises(Damaged, match="got 'Banded' and 'banded' for labels 0 and 1"):
        load_dataset("dtd", tmp_path)


def test_imagenet_s_own_two_are_told_apart_and_no_others(tmp_path: Path) -> None:
    tree = trees.imagenet(tmp_path)
    path = tree.folder / "classnames.txt"
    path.write_text(path.read_text().replace("n04355933 sunglasses", "n04355933 Sunglasses"))
    assert load_dataset("imagenet", tmp_path).classnames == ("tench", "sunglass", "sunglasses")
    path.write_text(path.read_text().replace("tench", "Sunglass"))
    with pytest.raises(Damaged, match="got 'Sunglass' and 'sunglass' for labels 0 and 1"):
        load_dataset("imagenet", tmp_path)


def test_clip_s_list_of_imagenet_falls_by_two_pairs_alone() -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    clip = load_clip("tiny")
    names = list(IMAGENET_CLASSNAMES)
    # places of n04008634 and n04355933 among the sorted folders
    assert (names[744], names[836]) == ("missile", "sunglasses")
    with pytest.raises(InputError, match="'missile' more than once"):
        ClassPrompts(clip, names)
    names[744], names[836] = "projectile", "sunglass"
    assert len(ClassPrompts(clip, names)) == 1000
    assert alike(names) is None


@pytest.mark.parametrize("field", ["classnames", "domains"])
def test_a_data_set_has_names_that_can_be_told_apart(field: str) -> None:
    whole = load_dataset("glyphs")
    names = getattr(whole, field)
    with pytest.raises(InputError, match=rf"Dataset: {field} must differ in more than capitals"):
        replace(whole, **{field: (*names[:-1], names[0].upper())})
    with pytest.raises(InputError, match=rf"{field} must be text .* got 'a\\x1bb' with a control"):
        replace(whole, **{field: (*names[:-1], "a\x1bb")})
