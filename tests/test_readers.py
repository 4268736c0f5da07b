"""Every reader of files, over files damaged at random: an answer or one sentence, soon, in bounds.

Twenty damages a reader here; ``FASTFPL_FUZZ=N`` makes N of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfpl
from fastfpl.config import load_yaml, make_settings
from fastfpl.data import load_dataset
from fastfpl.errors import FastfplError
from fastfpl.features import FeatureKey, FeatureStore
from fastfpl.federation.checkpoint import CHECKPOINT, _checksum, read_checkpoint
from fastfpl.report.load import load_comparisons
from fastfpl.trained import adapt
from tests import own_trees, trees
from tests.damage import JUNK, places
from tests.families import make_open_clip
from tests.worlds import GATE, TINY_RUN, small_clip

COUNT = int(os.environ.get("FASTFPL_FUZZ", "20"))
#: Seconds of the processor, and bytes beyond what the process holds, that one file may cost.
SECONDS, BYTES = 5.0, 1 << 30
#: What is put into a file at a random place.
STRANGE = (
    b"", b"\0", b"\xff\xfe", b"[" * 50_000, b"{" * 3000, b"9" * 5000, b"-1", b"1e999", b"NaN",
    b"../../x", b"/dev/zero", b"\x1b[31m", b"\n\n", b"\\ud800", b"!!python/object", b"&a [*a, *a]",
    (2**63).to_bytes(8, "little"), (2**31 - 1).to_bytes(4, "little"), b"\x80\x05", b"PK\x03\x04",
)  # fmt: skip


def damage(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, drop, repeat, or put something strange into bytes, once or twice."""
    for _ in range(draw.choice((1, 1, 2))):
        at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        kind = draw.randrange(6)
        if kind == 0:
            flipped = bytearray(content)
            for _ in range(draw.choice((1, 8)) if content else 0):
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            content = bytes(flipped)
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[end:]
        elif kind == 3:
            piece = content[at : min(end, at + 200)]
            content = content[:at] + piece * draw.choice((2, 100)) + content[at:]
        else:
            over = draw.choice((0, 0, 8))
            content = content[:at] + draw.choice(STRANGE) + content[at + over :]
    return content


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Hold what is done to the bounds of one file; a sentence of ours is an answer."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    begin = time.process_time()
    sentence = ""
    try:
        yield
    except FastfplError as error:
        sentence = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in sentence, what
    assert len(sentence) < 3000, what
    assert time.process_time() - begin < SECONDS, what


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def tell(
    folder: Path,
    read: Callable[[], object],
    wanted: Callable[[Path], bool] = lambda path: True,
) -> None:
    """Damage one file below a folder at a time and read; every file is put back."""
    draw = random.Random(folder.name)
    chosen = [path for path in files_below(folder) if wanted(path)]
    with bounded("undamaged"):
        read()
    for number in range(COUNT):
        path = draw.choice(chosen)
        content = path.read_bytes()
        changed = damage(content, draw)
        path.write_bytes(changed)
        try:
            with bounded(f"damage {number} of {path.relative_to(folder)}: {changed[:300]!r}"):
                read()
        finally:
            path.write_bytes(content)


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does"),
    # what a reader says of a file on the way is no failure
    pytest.mark.filterwarnings("ignore"),
]


# --- data sets ------------------------------------------------------------------------------------


def lists_and_an_image() -> Callable[[Path], bool]:
    seen: list[Path] = []

    def wanted(path: Path) -> bool:
        if path.suffix != ".jpg":
            return True
        seen.append(path)
        return seen[0] == path

    return wanted


@pytest.mark.parametrize("name", trees.TREES)
def test_data_sets(name: str, tmp_path: Path) -> None:
    root = tmp_path / name
    root.mkdir()
    tree = trees.TREES[name](root)

    def read() -> None:
        for corrupt in ("refuse", "skip"):
            dataset = load_dataset(tree.name, root, on_corrupt=corrupt)  # type: ignore[arg-type]
            for split in (dataset.train, dataset.test):
                split.images(range(min(len(split), 8)))

    tell(root, read, lists_and_an_image())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, tmp_path: Path) -> None:
    names = tuple(f"c{n}" for n in range(10 if name == "cifar10" else 100))
    trees.cifar(tmp_path, name, name, labels=range(len(names)), names=names)
    tell(tmp_path, lambda: load_dataset(name, tmp_path).train.images([0, 1]))


@pytest.mark.parametrize("kind", ["folder", "zip", "csv", "tsv", "jsonl"])
def test_own_images(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    paths = [f"{who}/{what}/{n}.png" for who in "ab" for what in ("cat", "dog") for n in range(3)]
    own_trees.tree(folder, *paths)
    names = json.dumps({"cat": "house cat", "dog": "dog"})
    rows = [{"path": path, "label": path[2:5], "client": path[0]} for path in paths]
    name = f"folder:{folder}"
    if kind in ("csv", "tsv"):
        name = f"manifest:{own_trees.table(folder / f'list.{kind}', rows)}"
    elif kind == "jsonl":
        (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        name = f"manifest:{folder / 'list.jsonl'}"
    (folder / "classes.json").write_text(names)
    if kind == "zip":
        archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
        shutil.rmtree(folder)
        folder.mkdir()
        name = f"folder:{shutil.move(archive, folder / 'packed.zip')}"

    def read() -> None:
        for corrupt in ("refuse", "skip"):
            dataset = load_dataset(name, on_corrupt=corrupt)  # type: ignore[arg-type]
            for split in (dataset.train, dataset.test):
                split.images(range(len(split)))

    tell(folder, read)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run that leaves files of every kind."""
    folder = tmp_path_factory.mktemp("run") / "o"
    more = {**TINY_RUN, "rounds": 1, "local_epochs": 1, "options": GATE, "threads": 1}
    fastfpl.run("pfedmoap", out=folder, model=CLIP, cache=folder.parent / "f", **more)
    adapt(folder, "digits", name="x", shots=1, model=CLIP, cache=folder.parent / "f")
    return folder


CLIP = small_clip()


def everything(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another version of the library
        model = fastfpl.load(folder, model=CLIP)
    for states in (model.checkpoint.clients, model.checkpoint.downloads):
        for state in states.values():
            dict(state)
    for name in model.joined:
        model.client(name)


def test_run_folders(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(played, folder)
    tell(folder, lambda: everything(folder))


def test_checkpoints_with_right_checksums(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(played, folder)
    path = folder / CHECKPOINT
    text = path.read_text()
    draw = random.Random(1)
    refused = 0
    for number in range(4 * COUNT):
        head = json.loads(text)
        head.pop("checksum")
        container, key = draw.choice(list(places(head)))
        junk: Any = draw.choice(JUNK)
        container[key] = junk
        path.write_text(json.dumps({**head, "checksum": _checksum(head)}))
        with bounded(f"{number}: {key!r} is {junk!r}"):
            refused += 1
            read_checkpoint(folder)
            everything(folder)
            refused -= 1
    assert refused > COUNT


def test_results(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(played / "result.json", folder)
    tell(folder, lambda: load_comparisons(folder))


# --- features, weights, settings ------------------------------------------------------------------


def test_features_are_right_or_computed_again(tmp_path: Path) -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    key = FeatureKey("w", "d", "train", "view", "pooled", "float32")
    store = FeatureStore(tmp_path / "store", chunk=4)

    def read() -> None:
        found = store.get(key, 9, lambda at: rows[torch.from_numpy(at)])
        assert torch.equal(found[:], rows)

    read()
    tell(tmp_path / "store", read)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights(nano: Any, kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / kind
    folder.mkdir()
    path = folder / f"w.{kind}"
    state = make_open_clip().state_dict()
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    tell(folder, lambda: fastfpl.load_clip("nano", path))


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "method: fedprox\nlr: 0.002\nshots: 16\noptions:\n  fedprox: &x {mu: 0.5}\nseed: 3\n"
        "as_released: []\nmax_memory: 8GiB\n"
    )
    tell(tmp_path, lambda: make_settings({"method": "fedprox", **load_yaml(path)}))
