"""Settings that are hostile or odd, in files and in flags: read as people write, or a sentence."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from fastfpl.cli.compare import _swept
from fastfpl.cli.flags import settings_of
from fastfpl.config import Settings, load_yaml
from fastfpl.federation import comparison
from fastfpl.federation import preparation as preparing
from fastfpl.methods import METHODS
from fastfpl.plain_yaml import parse_yaml
from tests.command import call


@pytest.mark.parametrize("written", ["1e-3", "1E5", ".5e1", "+1e3", "1.e-2", "2.5E+0", "+.5"])
def test_numbers_are_read_as_people_write_them(
    written: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert parse_yaml(written, "x") == float(written)
    assert parse_yaml(f"'{written}'", "x") == written
    config = tmp_path / "a.yaml"
    config.write_text(f"lr: {written}\noptions:\n  fedprox: {{mu: {written}}}\n")
    settings = settings_of("fedprox", None, config, [], {})
    assert (settings.lr, settings.options) == (float(written), {"mu": float(written)})
    assert settings_of("fedprox", None, None, [f"mu={written}"], {}).options == settings.options
    assert _swept(f"lr={written},1", {}) == ("lr", [float(written), 1])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = BOMB.replace("[x, x, x, x, x, x, x, x, x]", "{a: 1, b: 2, c: 3, d: 4}")
MERGES = MERGES.replace(" [*", " {<<: [*").replace("]\n", "]}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (BOMB.encode(), "at most 10000 values, aliases written out; got more in line 5"),
        (MERGES.encode(), "at most 10000 values, aliases written out; got more in line 5"),
        (b"lr: &a [*a]", "must hold no value inside itself; got *a in line 1"),
        (b"rounds: 1\nlr: 1\nrounds: 2", "must hold every key once; got rounds in line 3"),
        (b"options:\n  fedprox: {mu: 1, mu: 2}", "every key once; got mu in line 2"),
        (b"clients: 2\nctx_init: caf\xe9", "must be UTF-8; got the byte 0xE9 in line 2"),
        (b"lr: " + 5000 * b"9", "numbers of at most 100 digits"),
        (b"lr: 0x" + 5000 * b"f", "numbers of at most 100 digits"),
        (5000 * b"[", "at most 32 values inside each other"),
        (5000 * b"{a: ", "at most 32 values inside each other"),
        (b"lr: !!python/object/apply:os.system [ls]", "no tags; got tag:yaml.org,2002:python/ob"),
        (b"lr: !!int ''", "must hold no tags"),
        (b"lr: 2024-13-01", "must be YAML; got month must be in 1..12"),
        (b'root: "a\\0b"', "root is refused: input should be text"),
        (b"dataset: " + 100_000 * b"x", "dataset is refused: input should be text of at most 4096"),
        (b"lr: [" + 9000 * b"x, " + b"x]", "lr is refused"),
        (b"#" * (1 << 20) + b"\n", "must hold at most 1048576 bytes"),
        (b"\x00", "must be YAML"),
    ],
)
def test_hostile_files_of_settings_end_in_a_short_sentence(
    content: bytes, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_bytes(content)
    begin = time.perf_counter()
    code, _, err = call(capsys, "run", "promptfl", "--config", str(config))
    assert time.perf_counter() - begin < 5
    assert (code, err.count("\n")) == (2, 1), err
    assert sentence in err
    assert len(err) < 1000


def test_keys_of_an_alias_may_be_said_again(tmp_path: Path) -> None:
    text = "options:\n  fedprox: &x {mu: 1}\n  fedpgp: {<<: *x, mu: 2}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_yaml(tmp_path / "a.yaml")["options"]["fedpgp"] == {"mu": 2}


@pytest.mark.usefixtures("few_digits")
def test_chance_values_of_settings_end_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No setting, by flag, file, option or sweep, takes a value that ends in a traceback."""

    class Enough(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Enough

    monkeypatch.setattr(preparing, "load_model", stop)
    monkeypatch.setattr(comparison, "load_model", stop)
    monkeypatch.chdir(tmp_path)
    hostile = ["", " ", "0", "-1", 5000 * "9", "1e-3", "1e999", "nan", "-inf", "null", "~", "true"]
    hostile += ["[", "]", "{}", "[]", "a: b", "*x", "&a", "!!python/none", "a\0b", "\udcff", "é"]
    hostile += [5000 * "x", "../..", "/", "/dev/null", "2147483648", "9223372036854775808", "--"]
    hostile += [
        "1_000",
        "0x10",
        "1:30",
        "2024-13-01",
        "all",
        "none",
        "views:" + 50 * "9",
        "cuda:-1",
    ]
    keys = [key for key in Settings.model_fields if key not in ("method", "options", "clip")]
    draw = random.Random(0)
    begin, ended = time.perf_counter(), []
    for _ in range(150):
        method = draw.choice(list(METHODS))
        options = list(METHODS[method].Options.model_fields) or ["none"]
        key, value = draw.choice(keys), draw.choice(hostile)
        config = tmp_path / "c.yaml"
        config.write_text(f"{key}: {value}\n", encoding="utf-8", errors="surrogateescape")
        more = draw.choice(
            [
                [f"--{key.replace('_', '-')}={value}"],
                ["--config", "c.yaml"],
                ["-o", f"{draw.choice(options)}={value}"],
                ["--sweep", f"{key}={value}"],
                [draw.choice(["--out=", "--cache=", "--config=", "--preset=", "--seeds="]) + value],
            ]
        )
        command = draw.choice(["run", "compare", "profile"])
        quick = ["--dataset", "digits", "--clients", "2"]
        quick = [] if key in ("dataset", "clients") else quick
        try:
            code, _, err = call(capsys, command, method, *quick, *more)
        except Enough:
            ended.append("weights")
            continue
        ended.append("sentence")
        assert code == 2, (method, more)
        assert err.count("\n") == 1 or err.startswith("Usage:"), err
        assert len(err) < 2000
    assert time.perf_counter() - begin < 60
    assert {"weights", "sentence"} == set(ended)
