"""A run's folder holds what its figures were computed with: they are computed again from it."""

import json
import shutil

import pytest
import torch

import fastfpl
import fastfpl.federation.preparation
from fastfpl.config import Settings
from fastfpl.data import load_dataset
from fastfpl.errors import Damaged, InputError, Missing
from fastfpl.federation.checkpoint import CHECKPOINT, _checksum
from fastfpl.federation.models import load_models
from fastfpl.federation.preparation import prepare
from fastfpl.methods import METHODS
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import score
from tests.worlds import GATE, TINY_RUN, small_clip

# everybody but the last few trains in no round but the first: idle clients of every kind
RUN = {**TINY_RUN, "rounds": 3, "participation": 0.5, "threads": 1, "seed": 1, "local_epochs": 1}
OPTIONS = {
    "pfedmoap": GATE,
    "prompt-fedamp": {"sigma": 50.0},
    "promptfl-ft": {"epochs": 1},
    "fedapt-unsupervised": {"pseudo_rounds": 1, "threshold": 0.0},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread_one_digits():
    """Figures are compared bit for bit, and threads share sums; draw the digits once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = load_dataset("digits")
    patch = pytest.MonkeyPatch()
    patch.setattr(fastfpl.federation.preparation, "load_dataset", lambda name, root, **more: digits)
    yield
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def played(clip, tmp_path_factory):
    """Give the folder of a run, its result and the cache of its images."""
    cache, known = tmp_path_factory.mktemp("features"), {}

    def run(method, **changes):
        key = repr((method, sorted(changes.items())))
        if key not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            settings = {**RUN, "options": OPTIONS.get(method, {}), **changes}
            if METHODS[method].paired:
                settings["augment"] = "views:1"
            result = fastfpl.run(method, model=clip, cache=cache, out=out, **settings)
            known[key] = out, result, cache
        return known[key]

    return run


def rebuilt(folder, clip, cache):
    """Compute every client's accuracy from the folder: nothing of the run but its test images."""
    models = load_models(folder)
    method = models.method(clip)
    (exam,) = prepare(models.settings, model=clip, cache=cache).examiner.exams
    found = []
    for client in range(models.clients):
        down, own = models.states(method, client)
        scores = score(
            *(method, [client], stack([down]), stack([own]), exam.feed),
            {client: exam.images[client]},
        )
        found.append(scores[client].accuracy)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_headline_is_computed_again_from_the_folder(method, played, clip, tmp_path):
    out, result, cache = played(method)
    shutil.copytree(out, tmp_path / "moved")
    (tmp_path / "moved" / "result.json").unlink()
    assert rebuilt(tmp_path / "moved", clip, cache) == result.rounds[-1]["clients"]
    # a folder holds no more than it needs
    folders = {p.name for p in out.iterdir() if p.is_dir()}
    wanted = {"pfedmoap": {"clients", "downloads"}, "promptfl-ft": {"clients", "tuned"}}
    assert folders - {"clients"} == wanted.get(method, set()) - {"clients"}


@pytest.mark.parametrize("quirks", ["pfedmoap-pool-in-round", "all"])
def test_quirks_are_rebuilt_too(quirks, played, clip):
    out, result, cache = played("pfedmoap", as_released=quirks, schedule="cosine")
    assert rebuilt(out, clip, cache) == result.rounds[-1]["clients"]


def test_pools_that_have_moved_on_are_no_substitute(played, clip):
    """What a client would download now is not what it was evaluated with."""
    out, _, _ = played("pfedmoap")
    models = load_models(out)
    method = models.method(clip)
    moved = 0
    for client in models.checkpoint.downloads:
        down, _ = models.states(method, client)
        now = method.download(models.checkpoint.server, client, 3)
        moved += set(down) != set(now) or not torch.equal(
            down.get("experts", down["ctx"]), now.get("experts", now["ctx"])
        )
    assert moved == len(models.checkpoint.downloads) > 2


def test_shared_prompts_are_written_once(played):
    """Everybody received the prompts of everybody else: four, not four times three."""
    out, _, _ = played("pfedmoap", participation=1.0)
    (volume,) = (out / "downloads").iterdir()
    prompt = 4 * 32 * 4
    assert volume.stat().st_size < 7 * prompt + 1000 < 4 * 3 * prompt


def test_models_say_what_is_wrong(played, clip, tmp_path):
    out, _, _ = played("promptfl")
    models = load_models(out)
    assert models.classnames == tuple(load_dataset("digits").classnames)
    with pytest.raises(InputError, match=r"clip must be the run's, of weights [0-9a-f]{32}; got"):
        models.method(small_clip().to(dtype=torch.float64))
    with pytest.raises(InputError, match="client must be one of the 4; got 4"):
        models.states(models.method(clip), 4)
    with pytest.raises(Missing, match=r"must hold a run; got .* without checkpoint\.json"):
        load_models(tmp_path)
    shutil.copytree(out, tmp_path / "copy")
    path = tmp_path / "copy" / CHECKPOINT
    head = json.loads(path.read_text())
    head.pop("checksum")
    head["settings"]["method"] = "promptlf"
    path.write_text(json.dumps({**head, "checksum": _checksum(head)}))
    with pytest.raises(Damaged, match="must hold a run's settings; got"):
        load_models(tmp_path / "copy")


def test_a_run_that_stopped_between_evaluations_says_so(clip, played, tmp_path):
    _, _, cache = played("promptfl-ft")

    def stop(label, row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    settings = {**RUN, "options": {"epochs": 1}, "evaluate_every": 3}
    with pytest.raises(KeyboardInterrupt):
        fastfpl.run(
            "promptfl-ft", model=clip, cache=cache, out=tmp_path / "o", on_round=stop, **settings
        )
    models = load_models(tmp_path / "o")
    with pytest.raises(InputError, match="the last round must have been evaluated"):
        models.states(models.method(clip), 0)


def test_what_was_really_used_is_said(played, clip):
    """The settings name the class of a model that was handed over, and its dtype; not tiny."""
    out, result, _ = played("promptfl")
    assert (result.settings["clip"], result.settings["pretrained"]) == ("CLIP", None)
    assert result.settings["dtype"] == "float32"
    assert result.data["weights"] == clip.weights_digest
    assert load_models(out).settings.clip == "CLIP"
    assert Settings(method="promptfl").clip == "tiny"
