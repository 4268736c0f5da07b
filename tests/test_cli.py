"""The command line: exit codes, sentences, files, and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from fastfpl.cli import main
from fastfpl.cli.entry import group
from fastfpl.config import load_preset, load_yaml, make_settings, preset_names
from fastfpl.errors import InputError, Missing
from fastfpl.tracking import bars
from tests.command import QUICK, assert_a_line_a_round, call
from tests.warm import warm_python

# a real tower encodes all test images, and none of them is the point
pytestmark = pytest.mark.usefixtures("few_digits_throughout")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run pfedmop", "method must be a known one; got 'pfedmop'; did you mean 'pfedmoap'"),
        ("run promptfl --dataset glyfs", "did you mean 'glyphs'"),
        ("run promptfl --clip vit-b16", "did you mean 'ViT-B-16'?"),
        ("run promptfl --device gpu", "did you mean 'cuda'?"),
        ("run promptfl --quick-gelu no", "quick_gelu must be None or True for 'tiny'; got False"),
        ("run promptfl --clip tinny", "'tinny'"),
        ("run promptfl --preset nope", "preset must be a known one; got 'nope'"),
        ("run promptfl --beta .3", "beta must be left out with partition='pathological'"),
        ("run promptfl --split-test no", "split_test must be left out with partition="),
        ("run promptfl --repeat-rate 1", "repeat_rate is refused"),
        ("run promptfl --partition labeluni", "classes_per_client must be given"),
        ("run promptfl --n-ctx 4 --ctx-init a", "n_ctx must be left out with ctx_init"),
        ("run promptfl --n-ctx 75", "must fit into 77 tokens"),
        ("run promptfl --shots 0", "shots is refused: it must be at least 1, or 'all' for every"),
        ("run promptfl --threads 2147483648", "threads is refused: input should be less than or"),
        ("run promptfl --workers 1000000", "workers is refused: input should be less than or"),
        ("run promptfl --batch-size 1000000000000", "batch_size is refused: input should be less"),
        ("run promptfl --seed 9223372036854775808", "seed is refused: input should be at most"),
        ("run promptfl --lr 1e999", "lr is refused: input should be a finite number; got inf"),
        ("run promptfl --memory " + 5000 * "9", "max_memory must be bytes or a text such as"),
        ("run pfedmoap -o experts=[", "option experts must be YAML"),
        ("run pfedmoap -o experts=" + 5000 * "9", "numbers of at most 100 digits"),
        ("run pfedmoap -o experts=!!int", "option experts must hold no tags"),
        ("compare promptfl --sweep shots=1,[", "sweep of shots must be YAML"),
        ("compare promptfl --sweep as_released=[x]", "values must be numbers or texts"),
        ("run promptfl --augment views:0", "augment must be none, fresh or views:V"),
        ("run promptfl --crop .5", "crop must be left out with augment=none"),
        ("run promptfl --participation 0", "participation is refused"),
        ("run promptfl --lr inf", "lr is refused: input should be a finite number; got inf"),
        ("run promptfl --weight-decay nan", "weight_decay is refused: input should be a finite"),
        (
            "run fedprox -o mu=.inf",
            "fedprox's option mu is refused: Input should be a finite number",
        ),
        ("compare promptfl --lr=-inf", "lr is refused: input should be a finite number; got -inf"),
        ("run promptfl --clients 20 --dataset digits", "would be empty"),
        ("run promptfl --device tpu", "device must be auto, cpu or cuda; got 'tpu'"),
        ("run promptfl --device mps", "device must be auto, cpu or cuda; got 'mps'"),
        ("run promptfl --device meta", "device must be auto, cpu or cuda; got 'meta'"),
        ("run promptfl --device xpu", "device must be auto, cpu or cuda; got 'xpu'"),
        ("run promptfl --device cpu:3", "device must be there; got 'cpu:3'; use cpu"),
        ("run promptfl -o mu=1", "option must be one of promptfl's; got 'mu'; it has none"),
        ("run fedprox -o nu=1", "option must be one of fedprox's; got 'nu'"),
        ("run fedprox -o mu=-1", "fedprox's option mu is refused"),
        ("run fedprox -o mu", "option must read KEY=VALUE; got 'mu'"),
        ("run fedprox -o local.mu=1", "option must belong to fedprox"),
        ("run pfedmoap -o gate_width=48", "gate_width must divide D=128"),
        ("run zeroshot --position front", "position must be 'end' for zeroshot"),
        ("run promptfl --config nowhere.yaml", "the file must exist"),
        ("compare promptfl promptfl", "each once"),
        ("compare promptfl --seeds 1,x", "seeds must be whole numbers"),
        ("compare promptfl fedprox -o mu=1", "must name its method, as in promptfl.mu="),
        ("presets nope", "preset must be a known one"),
        ("report nowhere", "folder must exist; got nowhere"),
    ],
)
def test_mistakes_end_with_a_sentence_and_exit_code_2(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ["--out", str(tmp_path / "out")] if arguments.split()[0] in ("run", "compare") else []
    code, out, err = call(capsys, *arguments.split(), *extra)
    assert code == 2
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    ["run promptfl --rounds ten", "run promptfl --nonsense", "run", "compare", "report", "fly"],
)
def test_wrong_flags_exit_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *arguments.split())
    assert code == 2
    assert "Usage:" in err


def test_run_writes_a_result_and_refuses_to_overwrite_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    where = ["--out", str(folder), "--cache", str(tmp_path / "cache")]
    code, out, err = call(capsys, "run", "pfedmoap", *QUICK, *where, "-o", "experts=2")
    assert code == 0
    assert_a_line_a_round(err, "pfedmoap", 2)
    assert "pfedmoap" in out
    result = json.loads((folder / "result.json").read_text())
    assert set(result) >= {
        *("method", "settings", "environment", "faces", "rounds", "final", "peak_memory_bytes")
    }
    assert result["settings"]["options"]["experts"] == 2
    assert result["settings"]["options"]["heads"] == 8
    assert len(result["rounds"]) == 2
    for row in result["rounds"]:
        assert set(row) >= {"round", "accuracy", "clients", "seconds", "images_per_second"}
        assert set(row) >= {"bytes_up", "bytes_down"}
        assert row["accuracy"] == sum(row["clients"]) / 2
        assert 0 <= row["accuracy"] <= 1
    assert set(result["final"]) == {
        *("accuracy", "last5", "best", "std_over_clients", "macro_f1", "exams", "domains")
    }
    assert result["final"]["accuracy"] == result["rounds"][-1]["accuracy"]
    # compiled ones where fastfpl._C is built
    assert set(result["faces"]) == {"encode_text", "gate_experts"}
    assert all(names in (["cpu"], ["torch"]) for names in result["faces"].values())
    assert result["peak_memory_bytes"] > 1 << 20
    assert not re.search(r"/(home|root|tmp)/", json.dumps(result))
    before = (folder / "result.json").read_bytes()
    code, _, err = call(capsys, "run", "pfedmoap", *QUICK, *where)
    assert code == 2
    assert "must not hold a run already" in err
    assert (folder / "result.json").read_bytes() == before


def test_compare_prints_a_table_and_writes_a_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--out", str(tmp_path / "c"), "--cache", str(tmp_path / "cache")]
    arguments = ["compare", "zeroshot", "promptfl", *QUICK, *where, "--seeds", "0,1"]
    code, out, err = call(capsys, *arguments)
    assert code == 0
    lines = err.splitlines()
    assert [line.partition("  accuracy")[0] for line in lines] == [
        *("zeroshot, seed 0  round 1", "zeroshot, seed 1  round 1"),
        *(f"promptfl, seed {seed}  round {round_}" for seed in (0, 1) for round_ in (1, 2)),
    ]
    for name in ("zeroshot", "promptfl"):
        assert name in out
        for seed in (0, 1):
            assert (tmp_path / "c" / f"{name}-seed{seed}" / "result.json").is_file()
    assert (tmp_path / "c" / "index.html").is_file()
    assert (tmp_path / "c" / "accuracy.png").stat().st_size > 1000
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "must not hold a run already" in err
    code, again, _ = call(capsys, *arguments, "--resume")
    assert code == 0
    figures = [
        json.loads((tmp_path / "c" / f"promptfl-seed{s}" / "result.json").read_text())["final"]
        for s in (0, 1)
    ]
    assert figures[0] != figures[1]
    assert again.splitlines()[:4] == out.splitlines()[:4]


def test_report_writes_again_what_compare_wrote(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = ["--out", "c", "--cache", "cache"]
    code, out, _ = call(capsys, "compare", "zeroshot", "promptfl", *QUICK, *where)
    assert code == 0
    plan = json.loads(Path("c/comparison.json").read_text())
    assert plan == {"methods": ["zeroshot", "promptfl"], "seeds": [0], "rounds": 2}
    files = [p for p in Path("c").iterdir() if p.is_file() and p.name != "comparison.json"]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 6
    for path in files:
        path.unlink()
    assert call(capsys, "report", "c") == (0, out, "")
    assert {path: path.read_bytes() for path in files} == before
    # a run by itself, into another folder
    code, out, err = call(capsys, "report", "c/promptfl-seed0", "--out", "mine")
    assert (code, err) == (0, "")
    assert "promptfl" in out
    assert "zeroshot" not in out
    assert "mine/index.html" in out
    assert Path("mine/accuracy.png").stat().st_size > 1000
    # several runs
    code, out, err = call(capsys, "report", "c/promptfl-seed0", "c/zeroshot-seed0")
    assert (code, err) == (0, "")
    assert Path("runs/report/table.md").read_bytes() == before[Path("c/table.md")]
    # one that did not end
    Path("c/promptfl-seed0/result.json").unlink()
    code, out, err = call(capsys, "report", "c/promptfl-seed0")
    assert (code, out) == (2, "")
    assert err.startswith("error: fastfpl.load_comparisons: folder must hold finished runs")
    assert err.count("\n") == 1


def test_flags_win_over_the_file_and_the_file_over_the_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "clip: tiny\npretrained: null\nrounds: 3\nlocal_epochs: 1\nlr: 0.01\ndataset: digits\n"
        "clients: 2\naugment: none\noptions:\n  fedprox: {mu: 0.25}\n  pfedmoap: {experts: 3}\n"
    )
    code, _, err = call(
        capsys,
        *("run", "fedprox", "--preset", "pfedmoap-clip-sets", "--config", str(config)),
        *("--rounds", "1", "--shots", "2", "--out", str(tmp_path / "o")),
        *("--cache", str(tmp_path / "cache")),
    )
    assert code == 0
    assert_a_line_a_round(err, "fedprox", 1)
    settings = json.loads((tmp_path / "o" / "result.json").read_text())["settings"]
    assert settings["rounds"] == 1  # flag
    assert settings["lr"] == 0.01  # file
    assert settings["batch_size"] == 16  # preset
    assert settings["options"] == {"mu": 0.25}


@pytest.mark.parametrize("text", ["- a\n- b\n", "rounds: [\n", "1: 2\n"])
def test_a_file_that_holds_no_settings_is_refused(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    code, _, err = call(capsys, "run", "promptfl", "--config", str(config))
    assert code == 2
    assert "bad.yaml must" in err


def test_every_preset_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert preset_names()
    for name in preset_names():
        code, out, _ = call(capsys, "presets", name)
        assert code == 0
        preset = load_preset(name)
        assert preset.about in out
        assert yaml.safe_load(out) == preset.settings
        assert all(one.source in out for one in preset.published)
    code, out, _ = call(capsys, "presets")
    assert code == 0
    assert all(name in out for name in preset_names())


def test_a_long_step_says_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 61.0, 100.0, 122.0, 123.0, 190.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with bars.progress() as (observer, on_round):
        for done in range(5):
            observer("encoding", done, 9)
        observer("round 1", 0, 2)
        observer("round 1", 1, 2)
        on_round("promptfl", {"round": 0, "accuracy": None, "loss": 0.25, "seconds": 3})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        *("encoding  2 of 9", "encoding  4 of 9", "round 1  1 of 2"),
        "promptfl  round 1  loss 0.2500  3.0 s",
    ]


def test_a_reader_that_leaves_ends_no_one_in_a_traceback() -> None:
    reader = subprocess.Popen(
        [sys.executable, "-m", "fastfpl.cli", "presets"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert reader.stderr.read() == b""
    assert reader.wait() == 1
    reader.stderr.close()


def test_settings_refuse_unknown_keys_and_wrong_types() -> None:
    with pytest.raises(InputError, match=r"key must be a known one; got 'round'; did you mean"):
        make_settings({"method": "promptfl", "round": 3})
    with pytest.raises(InputError, match=r"rounds is refused: .*; got 'ten'"):
        make_settings({"method": "promptfl", "rounds": "ten"})
    with pytest.raises(InputError, match=r"rounds is refused"):
        make_settings({"method": "promptfl", "rounds": 2.5})
    with pytest.raises(InputError, match=r"seed is refused"):
        make_settings({"method": "promptfl", "seed": True})
    assert make_settings({"method": "promptfl", "shots": "all"}).shots is None
    assert make_settings({"method": "promptfl", "lr": 1}).lr == 1
    with pytest.raises(Missing, match="must exist"):
        load_yaml(Path("nowhere.yaml"))


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path) -> None:
    program = (
        "import sys; from fastfpl.cli import main; import fastfpl.federation.experiment as r\n"
        "from tests.worlds import on_few_digits\nfew = on_few_digits()\nfew.__enter__()\n"
        "old = r.save_checkpoint\n"
        "def stop(*a):\n    old(*a)\n    raise KeyboardInterrupt\n"
        "r.save_checkpoint = stop\nmain(sys.argv[1:])\n"
    )
    arguments = ["run", "promptfl", *QUICK, "--out", str(tmp_path / "o")]
    arguments += ["--cache", str(tmp_path / "cache")]
    first = subprocess.run(
        [*warm_python(), "-c", program, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 130
    assert "--resume" in first.stderr
    assert (tmp_path / "o" / "checkpoint.json").is_file()
    assert not (tmp_path / "o" / "result.json").exists()
    main([*arguments, "--resume"])
    rows = json.loads((tmp_path / "o" / "result.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["run", "promptfl"], True),
        (["compare", "local"], True),
        (["flower", "up", "local"], True),
        (["serve", "runs"], False),
        (["methods"], False),
        (["flower", "status", "x"], False),
    ],
)
def test_who_is_stopped_is_told_of_resume_where_there_is_one(arguments, kept, monkeypatch, capsys):
    monkeypatch.setattr(group, "main", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("stopped")
    assert ("--resume" in said) == kept


def test_a_warning_is_a_sentence_without_the_line_of_code(monkeypatch, capsys) -> None:
    """What pytest catches before it is written is written here, as in a process of its own."""

    def shown(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    def warn(**_: object) -> None:
        warnings.warn("fastfpl.load: figures may\ndiffer", UserWarning, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)

    monkeypatch.setattr(group, "main", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", shown)
        main([])
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: fastfpl.load: figures may differ"
    assert "UserWarning: of another library" in others[0]
