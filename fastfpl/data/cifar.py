"""CIFAR-10 and CIFAR-100, from the files that torchvision unpacks."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastfpl.data.base import Dataset, Images, Split, Statistics
from fastfpl.data.catalogue import FACTS, Facts, find_folder, open_root, require
from fastfpl.data.listing import size_notes
from fastfpl.data.names import named, shown, tidy
from fastfpl.data.pickles import load_plain
from fastfpl.errors import Damaged, InputError, Missing

__all__ = ["cifar10", "cifar100", "download"]

# the values by which the released codes normalise
_STATISTICS = {
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_ROW = 3 * 32 * 32


class _Pixels(Split):
    """Images in memory, uint8 of shape (n, 3, 32, 32)."""

    def __init__(
        self, name: str, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> None:
        self._pixels = pixels
        self.labels = labels
        self.domains = np.zeros_like(labels)
        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
        digest.update(labels.tobytes())
        self.fingerprint = f"{name}-{digest.hexdigest()}"

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`."""
        chosen = self._pixels[np.asarray(indices, dtype=np.int64)]
        return list(chosen.transpose(0, 2, 3, 1))


def cifar10(root: Path) -> Dataset:
    """Load CIFAR-10; see docs/datasets.md."""
    batches = tuple(f"data_batch_{n}" for n in range(1, 6))
    return _load("cifar10", root, "cifar-10-batches-py", batches, ("test_batch",), "")


def cifar100(root: Path) -> Dataset:
    """Load CIFAR-100 with its fine classes; see docs/datasets.md."""
    return _load("cifar100", root, "cifar-100-python", ("train",), ("test",), "fine_")


def download(name: str, root: str | Path) -> Path:
    """Download a set through torchvision into its folder below ``root``; nothing if it is there.

    Returns
    -------
    folder : Path
        The set's folder.

    Raises
    ------
    InputError
        If the set must be fetched by hand; the sentence says where.
    Missing
        If the download fails or torchvision cannot be imported.
    """
    known = sorted(name for name, facts in FACTS.items() if facts.download)
    if name not in known:
        where = f": get it from {FACTS[name].sources}" if name in FACTS else ""
        raise InputError(
            f"fastfpl.data.download: name must be one of {', '.join(known)}, which need no account "
            f"and no terms; got {name!r}{where}"
        )
    facts, root = FACTS[name], open_root("fastfpl.data.download", root)
    try:
        return find_complete(facts, root)
    except Missing:
        folder = root / facts.folders[0]
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive
    except (ImportError, RuntimeError) as error:
        raise Missing(
            f"fastfpl.data.download: torchvision must be installed; got {error}: "
            "pip install --upgrade torch torchvision"
        ) from error
    kind = getattr(datasets, facts.download)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Missing(
            f"fastfpl.data.download: {folder} must be a folder that can be made; got "
            f"{error.strerror}: name another root"
        ) from error
    try:
        download_and_extract_archive(
            kind.url, str(folder), filename=kind.filename, md5=kind.tgz_md5
        )
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise Missing(
            f"fastfpl.data.download: {kind.url} must be reachable and whole; got "
            f"{type(error).__name__}: {tidy(error)}: get it by hand and unpack it in {folder}"
        ) from error
    return find_complete(facts, root)


def find_complete(facts: Facts, root: Path) -> Path:
    """Return the set's folder if it holds everything."""
    folder = find_folder(facts, root)
    require(facts, folder)
    return folder


def _load(
    name: str,
    root: Path,
    place: str,
    train: tuple[str, ...],
    test: tuple[str, ...],
    fine: str,
) -> Dataset:
    facts = FACTS[name]
    folder = find_complete(facts, root) / place
    meta = folder / ("meta" if fine else "batches.meta")
    called = _field(
        facts, meta, _content(facts, meta), "fine_label_names" if fine else "label_names"
    )
    if not isinstance(called, list) or not all(isinstance(n, str | bytes) for n in called):
        raise Damaged(f"{facts.op}: {meta} must hold a list of class names; got {shown(called)}")
    texts = (n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in called)
    names = named(facts, dict(enumerate(texts)), meta)
    splits = [
        _Pixels(name, *_read(facts, [folder / file for file in files], f"{fine}labels", len(names)))
        for files in (train, test)
    ]
    notes = size_notes(facts, len(names), len(splits[0]), len(splits[1]))
    return Dataset(
        name=name,
        classnames=names,
        domains=facts.domains,
        train=splits[0],
        test=splits[1],
        statistics=_STATISTICS[name],
        notes=notes,
    )


def _content(facts: Facts, path: Path) -> dict[Any, Any]:
    content = load_plain(path, facts.op)
    if not isinstance(content, dict):
        raise Damaged(f"{facts.op}: {path} must hold a dict; got {type(content).__name__}")
    return content


def _field(facts: Facts, path: Path, content: dict[Any, Any], key: str) -> Any:
    # the published files were written by Python 2, whose strings are bytes
    for spelling in (key.encode(), key):
        if spelling in content:
            return content[spelling]
    raise Damaged(f"{facts.op}: {path} must hold {key!r}; got {shown(list(content))}")


def _read(
    facts: Facts, paths: list[Path], key: str, classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read batches: pixels (n, 3, 32, 32) and labels (n,)."""
    pixels: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in paths:
        content = _content(facts, path)
        rows, mine = _field(facts, path, content, "data"), _field(facts, path, content, key)
        good = isinstance(rows, np.ndarray) and rows.dtype == np.uint8
        if not good or rows.ndim != 2 or rows.shape[1] != _ROW:
            got = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows)
            raise Damaged(f"{facts.op}: data of {path} must be uint8 (n, {_ROW}); got {got}")
        if not isinstance(mine, list) or len(mine) != len(rows):
            count = len(mine) if isinstance(mine, list) else type(mine).__name__
            raise Damaged(
                f"{facts.op}: labels of {path} must be a list, one per image; got {count} with "
                f"{len(rows)} images"
            )
        bad = [label for label in mine if type(label) is not int or not 0 <= label < classes]
        if bad:
            raise Damaged(
                f"{facts.op}: labels of {path} must lie in [0, {classes}); got {shown(bad[0])}"
            )
        pixels.append(rows.reshape(-1, 3, 32, 32))
        labels += mine
    if not labels:
        raise Damaged(f"{facts.op}: {paths[0]} must hold an image; got none")
    return np.concatenate(pixels), np.array(labels, dtype=np.int64)
