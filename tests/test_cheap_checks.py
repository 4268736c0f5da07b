"""What is cheap to check is checked before weights are read and before a run is played."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastfpl.cli import main
from fastfpl.federation import rounds
from fastfpl.training import preparation
from tests.command import QUICK, call, not_to_be_called

# a real tower encodes all test images, and none of them is the point
pytestmark = pytest.mark.usefixtures("few_digits_throughout")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run promptfl --dataset dtd --root nowhere", "root"),
        ("run promptfl --dataset nope", "must be a data set"),
        ("run promptfl --dataset digits --clients 20", "would be empty"),
        ("run promptfl --dataset digits --statistics dataset", "statistics must be 'clip'"),
        ("run promptfl --dataset glyphs --sampling domain", "sampling must be 'uniform'"),
        ("run promptfl --cache file/x", "directory (--cache) must be a folder"),
        ("run promptfl --out file", "out must be a folder"),
        ("run promptfl --out file/x", "out must be a folder"),
        ("run promptfl --out held", "out must not hold a run already"),
        ("run promptfl --out held --resume --lr .1", "must have the settings of held; got lr: 0.0"),
        ("run promptfl --out held --resume --rounds 1", "rounds must be at least the 2"),
        ("run promptfl --clip ViT-B-61", "did you mean 'ViT-B-16'"),
        ("profile promptfl --dataset dtd --root nowhere", "root"),
    ],
)
def test_cheap_checks_come_before_the_weights(
    arguments: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    held: Path,
) -> None:
    monkeypatch.chdir(held.parent)
    monkeypatch.setattr(preparation, "load_clip", not_to_be_called)
    command, method, *own = arguments.split()
    quick = [] if command == "profile" else list(QUICK)
    code, _, err = call(capsys, command, method, *quick, "--cache", "cache", *own)
    assert (code, err.count("\n")) == (2, 1), err
    assert sentence in err


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a run of two rounds, beside a file."""
    folder = tmp_path_factory.mktemp("cheap")
    (folder / "file").touch()
    main(["run", "promptfl", *QUICK, "--out", str(folder / "held"), "--cache", str(folder / "c")])
    return folder / "held"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("promptfl --sweep clients=2,20", "would be empty"),
        ("promptfl --sweep clients=2,2.5", "clients is refused"),
        ("promptfl --sweep dataset=digits,nope", "must be a data set"),
        ("promptfl --sweep n_ctx=2,75", "must fit into 77 tokens"),
        ("promptfl --sweep clip=tiny,tinny", "got 'tinny'"),
        ("promptfl pfedmoap -o pfedmoap.gate_width=48", "gate_width must divide D=128"),
        ("promptfl fedapt-unsupervised", "augment must be fresh or views:V"),
        ("promptfl --seeds 0,-1", "seed is refused"),
    ],
)
def test_all_runs_are_checked_before_the_first_is_played(
    arguments: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(rounds.Federation, "round", not_to_be_called)
    given = arguments.split()
    quick = dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    if "--sweep" in given:
        quick.pop("--" + given[given.index("--sweep") + 1].partition("=")[0].replace("_", "-"), 0)
    flags = [part for pair in quick.items() for part in pair]
    code, out, err = call(capsys, "compare", *given, *flags, "--out", str(tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_held_folder_of_a_later_run_is_seen_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, held: Path, tmp_path: Path
) -> None:
    shutil.copytree(held, tmp_path / "c" / "promptfl-seed1")
    monkeypatch.setattr(preparation, "load_clip", not_to_be_called)
    where = ["--seeds", "0,1", "--out", str(tmp_path / "c")]
    code, _, err = call(capsys, "compare", "promptfl", *QUICK, *where)
    assert code == 2
    assert "promptfl-seed1; go on with it by resume" in err
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["promptfl-seed1"]
