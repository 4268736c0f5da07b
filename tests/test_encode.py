"""Features alone, ahead of many runs: whatever these deal, they encode nothing."""

import logging
import os
import subprocess
import time

import pytest

import fastfpl
from fastfpl.cli import main
from fastfpl.errors import InputError
from fastfpl.features import store as features
from fastfpl.training.feeds import ENCODING
from tests.warm import warm_python
from tests.worlds import TINY_RUN, figures, small_clip

RUN = {**TINY_RUN, "rounds": 1, "local_epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def clip():
    return small_clip()


def encoded(method, clip, cache, **changes):
    """Titles of what a run encodes, and its figures."""
    titles = []
    result = fastfpl.run(
        method,
        model=clip,
        cache=cache,
        observer=lambda what, done, total: titles.append(what),
        **{**RUN, **changes},
    )
    return {title for title in titles if title.startswith(ENCODING)}, figures(result)


def test_runs_of_any_deal_find_everything_there(clip, tmp_path):
    (one,) = fastfpl.encode(["digits"], methods=["promptfl", "fedotp"], model=clip, cache=tmp_path)
    assert (one.dataset, one.train, one.test) == ("digits", 1198, 599)
    assert set(one.kinds) == {"pooled", "patches"}
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    for changes in ({}, {"seed": 1, "shots": 2}, {"partition": "iid", "shots": None}):
        for method in ("promptfl", "fedotp"):
            assert encoded(method, clip, tmp_path, **changes)[0] == set()
    assert sorted(tmp_path.iterdir()) == files
    # the same figures as of a run that encodes for itself
    own = encoded("promptfl", clip, tmp_path / "own")
    assert own[0] == {"encoding train images", "encoding test images"}
    beside = encoded("promptfl", clip, tmp_path)[1]
    assert beside[-1]["accuracy"] == own[1][-1]["accuracy"]
    assert beside[0]["loss"] == pytest.approx(own[1][0]["loss"], rel=1e-5)


def test_views_are_encoded_too_and_fresh_crops_cannot_be(clip, tmp_path):
    same = {"augment": "views:2", "methods": ["promptfl"], "model": clip, "cache": tmp_path}
    fastfpl.encode(["digits"], **same)
    assert len(list(tmp_path.iterdir())) == 3
    assert encoded("promptfl", clip, tmp_path, augment="views:2")[0] == set()
    (one,) = fastfpl.encode(["digits"], **{**same, "augment": "fresh"})
    assert one.train == 0


def test_what_cannot_be_is_refused_before_anything_is_encoded(clip, tmp_path):
    for datasets, more, sentence in (
        ([], {}, "datasets must be one or more"),
        (["digits", "nope"], {}, "must be a data set"),
        (["digits"], {"methods": []}, "methods must be one or more"),
        (["digits"], {"methods": ["nope"]}, "method"),
        (["digits"], {"max_memory": "1GiB"}, "max_memory must be left out"),
        (["digits"], {"colour": 1}, "colour"),
    ):
        with pytest.raises(InputError, match=sentence):
            fastfpl.encode(datasets, model=clip, cache=tmp_path / "c", **more)
    assert not (tmp_path / "c").exists()


def test_the_command_line_says_what_is_there(tmp_path, capsys):
    main(["encode", "digits", "--for", "fedotp", "--threads", "1", "--cache", str(tmp_path)])
    said = capsys.readouterr().out
    assert (
        said == f"digits: 599 test images and 1,198 for training, patches features in {tmp_path}\n"
    )
    main(["encode", "--help"])
    said = capsys.readouterr().out
    assert "--for METHOD" in said
    assert "Privacy:" not in said  # nothing of it decides a feature
    with pytest.raises(SystemExit) as stopped:
        main(["encode", "nope", "--cache", str(tmp_path)])
    assert stopped.value.code == 2


CHILD = """
import sys
from pathlib import Path
import fastfpl
from tests.worlds import small_clip
cache, mark = map(Path, sys.argv[1:])
def stop(what, done, total):
    if done >= 512:
        mark.touch()
        import time
        time.sleep(100)
fastfpl.encode(["digits"], model=small_clip(), cache=cache, observer=stop, threads=1)
"""


@pytest.mark.slow
def test_a_few_shot_run_waits_for_the_encoder_and_survives_its_death(
    clip, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(features, "_POLL", 0.05)
    root = os.path.dirname(os.path.dirname(fastfpl.__file__))
    command = [*warm_python(), "-c", CHILD, str(tmp_path / "c"), str(tmp_path / "there")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    try:
        while not (tmp_path / "there").exists():
            assert process.poll() is None
            time.sleep(0.02)
        seen = []

        def observer(what, done, total):
            if what.startswith(ENCODING) and not seen:
                seen.append((done, total))
                process.kill()  # it waits
                process.wait()

        with caplog.at_level(logging.WARNING, "fastfpl"):
            fastfpl.run(
                "promptfl", model=clip, cache=tmp_path / "c", observer=observer, **RUN
            )  # fmt: skip
    finally:
        process.kill()
        process.wait()
    assert seen == [(512, 1198)]
    said = [r.getMessage() for r in caplog.records if "another process" in r.getMessage()]
    assert "another process is encoding these 1198 images into" in said[0]
