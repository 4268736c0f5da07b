"""Pickles of data sets: plain values come back, and whatever would run is refused unrun."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.data.pickles import load_plain
from fastfpl.errors import Damaged
from tests import trees
from tests.trees import TREES


class Touch:
    """Asks to make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["domainnet10", "office_caltech10", "cifar10", "cifar100"])
def test_a_pickle_that_runs_a_command_is_refused_unrun(
    name: str, protocol: int, tmp_path: Path
) -> None:
    trap = Touch(tmp_path / "trap")
    if name.startswith("cifar"):
        trees.cifar(tmp_path, name, name)
        file = "test_batch" if name == "cifar10" else "meta"
        (path,) = tmp_path.rglob(file)
        content: object = {b"data": trap, b"labels": [0]}
    else:
        path = TREES[name](tmp_path).folder / f"{FACTS[name].domains[1]}_test.pkl"
        content = (np.array(["a"]), np.array([trap], dtype=object))
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(Damaged, match=r"got UnpicklingError: it names (posix|nt)\.system"):
        load_dataset(name, tmp_path)
    assert not (tmp_path / "trap").exists()
    # the trap is a real one
    pickle.loads(path.read_bytes())
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"cbuiltins\neval\n(V1+1\ntR.", "it names builtins.eval"),
        (b"cnumpy\nload\n(Vx\ntR.", "it names numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "it names numpy.core.multiarray.fromfile"),
        (b"cnumpy\ndtype\n}(Vx\nI1\nub.", "it changes a function"),
        (b"cnumpy\nndarray\n(I1\ntR.", "must be a pickle of plain"),
        (b"cnumpy\ndtype\n(VV8\ntR.", "an array of 'V8'"),
        (b"cnumpy\ndtype\n(VO\ntR.", "it holds a _Dtype"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(tR.", "an array without content"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "it encodes by 'rot13'"),
        (b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.", "must be a pickle of plain"),
        (b"cnumpy\ndtype\n.", "it holds a _Call"),
        (b"]]]]]]]aaaaaa.", "nested deeper than 4 levels"),
        (b"]\x94h\x00a.", "must be a pickle"),
        (b"P1\n.", "must be a pickle"),
        (b"", "EOFError"),
        (b"PK\x03\x04", "must be a pickle"),
        (b"\x80\x04\x8f.", "it holds a set"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc.", "it is cut off"),
        (b"\x80\x02]r\xff\xff\xff\x7fX\xff\xff\xff\x7fa.", "must be a pickle"),
    ],
)
def test_other_tricks_of_pickles_are_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(Damaged, match=r"fastfpl\.test: .*do not trust the file") as caught:
        load_plain(tmp_path / "x.pkl", "fastfpl.test")
    assert sentence in str(caught.value)


def test_lists_that_name_each_other_are_not_walked(tmp_path: Path) -> None:
    def lists(width: int, depth: int) -> bytes:
        content = b"\x80\x04(NNNl\x94"
        for level in range(depth):
            content += b"(" + (b"h" + bytes([level])) * width + b"l\x94"
        return content + b"."

    def tuples(width: int, depth: int, end: bytes) -> bytes:
        content = b"\x80\x04(NNNt\x94"
        for level in range(depth):
            content += b"(" + (b"h" + bytes([level])) * width + b"t\x94"
        return content + end

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    kind = b"cnumpy\ndtype\n(VO\ntR"
    cases = {
        "lists": lists(60, 3),
        "many lists": lists(250, 3),
        "tuples": tuples(60, 3, b"."),
        # their hash walks them
        "keys": b"\x80\x04}" + tuples(60, 8, b"Ns.")[2:],
        "items": b"\x80\x04}(" + tuples(60, 8, b"Nu.")[2:],
        "sets": b"\x80\x04\x8f(" + tuples(60, 8, b"\x90.")[2:],
        # so does their text
        "dtype": b"cnumpy\ndtype\n" + tuples(60, 8, b"\x85R.")[2:],
        "encoding": b"c_codecs\nencode\nVx\n" + tuples(60, 8, b"\x86R.")[2:],
        # each array copies what they share
        "objects": b"(" + b"Vabc\n" * 10_000 + b"l\x94("
        + (array + b"(K\x01M\x10'\x85" + kind + b"I00\nh\x00tb") * 3_000 + b"l.",
        "text": b"V" + b"x" * 100_000 + b"\n\x940("
        + b"c_codecs\nencode\n(h\x00Vlatin1\ntR" * 20_000 + b"l.",
        # arguments that are copied for each call
        "arguments": b"(" + b"N" * 100_000 + b"t\x940("
        + b"cnumpy.core.multiarray\n_reconstruct\nh\x00R" * 20_000 + b"l.",
    }  # fmt: skip
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        start = time.process_time()
        with pytest.raises(Damaged, match="do not trust the file") as caught:
            load_plain(path, "fastfpl.test")
        assert time.process_time() - start < 2, name
        assert len(str(caught.value)) < 1000
        if "lists" in name or name in ("tuples", "text", "objects"):
            assert "name each other to more than its own size" in str(caught.value), name
    # some of it is what an honest file may do
    path.write_bytes(lists(60, 2))
    assert len(load_plain(path, "fastfpl.test")) == 60
    same = [f"{n}.jpg" for n in range(9000)]
    path.write_bytes(pickle.dumps([same, same, {"a": same}]))
    assert load_plain(path, "fastfpl.test") == [same, same, {"a": same}]


ARRAYS = st.one_of(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))).map(
        lambda v: np.array(v, dtype=object)
    ),
    st.lists(st.text("abc/_.", min_size=1), min_size=1).map(np.array),
    st.tuples(st.sampled_from(["u1", "<i8", ">i4", "<f8", ">f4"]), st.integers(0, 5)).map(
        lambda p: np.arange(3 * p[1]).reshape(3, p[1]).astype(p[0])
    ),
    st.just(np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4))),
)
PLAIN = st.one_of(
    ARRAYS, st.integers(), st.text(), st.binary(), st.none(), st.booleans(), st.floats(-9, 9)
)


@given(st.lists(PLAIN, max_size=4), st.integers(0, 5), st.sampled_from([list, tuple]))
def test_plain_pickles_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], protocol: int, kind: type
) -> None:
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    path.write_bytes(pickle.dumps({"a": kind(values)}, protocol))
    content = load_plain(path, "fastfpl.test")
    assert type(content["a"]) is kind
    for got, wanted in zip(content["a"], values, strict=True):
        if isinstance(wanted, np.ndarray):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)
        else:
            assert got == wanted


@pytest.mark.parametrize("protocol", range(6))
def test_scalars_of_numpy_come_back(protocol: int, tmp_path: Path) -> None:
    values = [np.str_("ice_cream"), np.int64(-7), np.float32(0.5), np.uint8(200), b"", b"\xff"]
    (tmp_path / "x").write_bytes(pickle.dumps(values, protocol))
    plain = ["ice_cream", -7, 0.5, 200, b"", b"\xff"]
    assert load_plain(tmp_path / "x", "fastfpl.test") == plain


@pytest.mark.parametrize("order", "<>")
def test_letters_that_are_none_are_refused(order: str, tmp_path: Path) -> None:
    letters = np.array([0x10FFFF, 97, 0x110000], dtype=f"{order}u4")
    for last, right in ((2, True), (3, False)):
        (tmp_path / "x").write_bytes(pickle.dumps(letters[:last].view(f"{order}U1"), 2))
        if right:
            assert list(load_plain(tmp_path / "x", "fastfpl.test")) == ["\U0010ffff", "a"]
        else:
            with pytest.raises(Damaged, match="text of numbers that are no characters"):
                load_plain(tmp_path / "x", "fastfpl.test")


@given(st.data())
def test_broken_pickles_are_refused_or_plain(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = (np.array(["a/b.jpg", "c.jpg"], dtype=object), np.array(["x", "y"]), np.arange(3))
    content = bytearray(pickle.dumps(rows, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    path.write_bytes(content)
    refused = "fastfpl.test: do not trust the file"
    try:
        load_plain(path, "fastfpl.test")
    except Damaged as error:
        refused = str(error)
    assert refused.startswith("fastfpl.test: ")
    assert "do not trust the file" in refused


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ((np.array(["DomainNet/real/a.jpg"]),), "must hold two arrays of strings"),
        (({"a": 1}, {"b": 1}), "must hold two arrays of strings of one length"),
        ((np.array(["a", "b"]), np.array(["bird"])), "of one length, paths and class names; got 2"),
        ((np.array([1, 2]), np.array(["bird", "tiger"])), "got another kind of entry"),
        ((np.array(["DomainNet/real/a.jpg"]), np.array(["dog"])), "must be of bird, .* got 'dog'"),
        ((np.array(["/abs/a.jpg"]), np.array(["bird"])), "below the images' folder; got '/"),
        ((np.array(["DomainNet/../../x"]), np.array(["bird"])), "below the images' folder"),
    ],
)
def test_pairs_that_are_no_lists_of_images_are_refused(
    pair: object, sentence: str, tmp_path: Path
) -> None:
    tree = trees.domainnet10(tmp_path)
    (tree.folder / "real_test.pkl").write_bytes(pickle.dumps(pair))
    with pytest.raises(Damaged, match=sentence):
        load_dataset("domainnet10", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("labels", [0, 1, 2, 3], r"must lie in \[0, 3\); got 3"),
        ("labels", [0, 1, 2, -1], r"must lie in \[0, 3\); got -1"),
        ("labels", [0, 1, 2, True], r"must lie in \[0, 3\); got True"),
        ("labels", [0, 1, 2], "one per image; got 3 with 4 images"),
        ("labels", None, "must be a list, one per image; got NoneType"),
        ("data", np.zeros((4, 3072)), r"must be uint8 \(n, 3072\); got float64"),
        (
            "data",
            np.zeros((4, 1024), np.uint8),
            r"must be uint8 \(n, 3072\); got uint8 \(4, 1024\)",
        ),
        ("data", b"x", r"must be uint8 \(n, 3072\); got"),
    ],
)
def test_cifar_batches_are_checked(key: str, value: object, sentence: str, tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, key.encode(): value}))
    with pytest.raises(Damaged, match=sentence) as caught:
        load_dataset("cifar10", tmp_path)
    assert "data_batch_3" in str(caught.value)
    del content[key.encode()]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(Damaged, match=f"data_batch_3 must hold '{key}'; got"):
        load_dataset("cifar10", tmp_path)
