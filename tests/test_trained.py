"""A run's folder is a model: it answers as the run's own evaluation did, bit for bit."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastfpl
import fastfpl.federation.preparation
from fastfpl.config import Settings, make_settings
from fastfpl.data import Statistics, load_dataset
from fastfpl.errors import Damaged, InputError, KindError, Missing, NotSupported
from fastfpl.federation.checkpoint import CHECKPOINT, _checksum
from fastfpl.federation.preparation import prepare
from fastfpl.methods import METHODS
from fastfpl.trained import models
from fastfpl.training import scoring
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


def answers(folder, clip, cache):
    """Ask every client about its own test images: nothing of the run but its folder."""
    model = fastfpl.load(folder, model=clip)
    (exam,) = prepare(model.settings, model=clip, cache=cache).examiner.exams
    found = []
    for client in range(model.clients):
        at = exam.images[client]
        said = model.client(client).logits(exam.feed.batch(at)).argmax(dim=-1).numpy()
        found.append(float((said == exam.feed.split.labels[at]).mean()))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_headline_is_computed_again_from_the_folder(method, played, clip, tmp_path):
    out, result, cache = played(method)
    shutil.copytree(out, tmp_path / "moved")
    (tmp_path / "moved" / "result.json").unlink()
    assert answers(tmp_path / "moved", clip, cache) == result.rounds[-1]["clients"]
    # a folder holds no more than it needs
    folders = {p.name for p in out.iterdir() if p.is_dir()}
    wanted = {"pfedmoap": {"clients", "downloads"}, "promptfl-ft": {"clients", "tuned"}}
    assert folders - {"clients"} == wanted.get(method, set()) - {"clients"}


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_evaluation_bit_for_bit(method, clip, tmp_path, monkeypatch):
    """From the pixels on: what `score` saw in the run, and what a loaded client says."""
    seen = {}
    check = scoring.check_logits

    def spy(which, logits, shape):
        seen.setdefault(run, []).append(logits[0].clone())
        check(which, logits, shape)

    monkeypatch.setattr(scoring, "check_logits", spy)
    settings = {**RUN, "rounds": 2, "options": OPTIONS.get(method, {}), "scenario": "global"}
    settings |= {"cohort": 1, "evaluate_every": 2}
    if METHODS[method].paired:
        settings["augment"] = "views:1"
    run, out = "run", tmp_path / "out"
    fastfpl.run(method, model=clip, cache=tmp_path / "features", out=out, **settings)
    # the first question: all test images, of every client
    split = load_dataset("digits").test
    images = list(split.images(range(len(split))))
    model = fastfpl.load(out, model=clip)
    clients = [model.client(c) for c in range(4)] if METHODS[method].personal else None
    clients = clients or [model.global_model()]
    whole = [logits for logits in seen["run"] if len(logits) == len(split)]
    assert len(whole) == len(clients)
    features = clients[0].image_features(images)
    for client, logits in zip(clients, whole, strict=True):
        assert torch.equal(client.logits(features), logits)
    said = clients[0].predict(images[:5])
    assert torch.allclose(said.logits, whole[0][:5], rtol=1e-4, atol=1e-4)
    assert said.names == [model.classnames[c] for c in whole[0][:5].argmax(dim=-1).tolist()]


@pytest.mark.parametrize("quirks", ["pfedmoap-pool-in-round", "all"])
def test_quirks_are_rebuilt_too(quirks, played, clip):
    out, result, cache = played("pfedmoap", as_released=quirks, schedule="cosine")
    assert answers(out, clip, cache) == result.rounds[-1]["clients"]


def test_pools_that_have_moved_on_are_no_substitute(played, clip):
    """What a client would download now is not what it was evaluated with."""
    out, _, _ = played("pfedmoap")
    model = fastfpl.load(out, model=clip)
    moved = 0
    for client in model.checkpoint.downloads:
        down, _ = model.states(client)
        now = model.method.download(model.checkpoint.server, client, 3)
        moved += set(down) != set(now) or not torch.equal(
            down.get("experts", down["ctx"]), now.get("experts", now["ctx"])
        )
    assert moved == len(model.checkpoint.downloads) > 2


def test_shared_prompts_are_written_once(played):
    """Everybody received the prompts of everybody else: four, not four times three."""
    out, _, _ = played("pfedmoap", participation=1.0)
    (volume,) = (out / "downloads").iterdir()
    prompt = 4 * 32 * 4
    assert volume.stat().st_size < 7 * prompt + 1000 < 4 * 3 * prompt


def test_loading_says_what_is_wrong(played, clip, tmp_path):
    out, _, _ = played("promptfl")
    model = fastfpl.load(out, model=clip)
    assert model.classnames == tuple(load_dataset("digits").classnames)
    assert (model.round, model.finished, model.clients) == (2, True, 4)
    assert fastfpl.load(out, 2, model=clip).round == 2
    with pytest.raises(InputError, match="round must be the last that was played, 2; got 0"):
        fastfpl.load(out, 0, model=clip)
    with pytest.raises(InputError, match=r"CLIP must be the run's, of weights [0-9a-f]{32}; got"):
        fastfpl.load(out, model=small_clip().to(dtype=torch.float64))
    with pytest.raises(Missing, match=r"must be handed over by model=; got none.*\(CLIP\)"):
        fastfpl.load(out)
    for wrong in (4, -1, "7", True, None):
        with pytest.raises(InputError, match="client must be"):
            model.client(wrong)
    with pytest.raises(InputError, match="4, from 0 to 3; got 'Berlin'; nobody has joined"):
        model.client("Berlin")
    with pytest.raises(Missing, match=r"must hold a run; got .* without checkpoint\.json"):
        fastfpl.load(tmp_path)
    with pytest.raises(Missing, match="which holds the runs out: name one"):
        fastfpl.load(out.parent)
    with pytest.raises(KindError, match="folder must be a path; got int"):
        fastfpl.load(3)
    with pytest.raises(Missing, match=r"which is no folder: name the out \(--out\) of one"):
        fastfpl.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="device must be"):
        fastfpl.load(out, device="tpu")


def changed(out, copy, **changes):
    """Copy a run with another head."""
    shutil.copytree(out, copy)
    path = copy / CHECKPOINT
    head = json.loads(path.read_text())
    head.pop("checksum")
    for key, value in changes.items():
        head[key] = {**head[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps({**head, "checksum": _checksum(head)}))
    return copy


def test_folders_of_others(played, clip, tmp_path):
    out, _, _ = played("promptfl")
    other = changed(out, tmp_path / "a", settings={"method": "promptlf"})
    with pytest.raises(Damaged, match="must hold a run's settings; got"):
        fastfpl.load(other, model=clip)
    other = changed(out, tmp_path / "b", format="fastfpl-checkpoint-2")
    with pytest.raises(Damaged, match=r"format 'fastfpl-checkpoint-2' of fastfpl .* where"):
        fastfpl.load(other, model=clip)
    other = changed(out, tmp_path / "c", library="0.0.7")
    with pytest.warns(UserWarning, match=r"is of fastfpl 0\.0\.7, this is .*: figures may differ"):
        assert fastfpl.load(other, model=clip).global_model().classnames


def test_a_run_that_goes_on_meanwhile_is_read_again(played, clip, tmp_path, monkeypatch):
    out, _, _ = played("promptfl")
    shutil.copytree(out, tmp_path / "run")
    path, read, tries = tmp_path / "run" / CHECKPOINT, models.read_checkpoint, []

    def moved(folder, device):
        tries.append(folder)
        if len(tries) == 1:
            os.utime(path, ns=(1, 1))
            raise Damaged("names checkpoint-00001.safetensors, which is not there")
        return read(folder, device)

    monkeypatch.setattr(models, "read_checkpoint", moved)
    assert fastfpl.load(tmp_path / "run", model=clip).round == 2
    assert len(tries) == 2


def test_a_run_that_goes_on_says_so_to_who_asks_for_its_clients(played, clip, tmp_path):
    """Files of clients are read when asked for, and a round later others are there."""
    shutil.copytree(played("pfedmoap")[0], tmp_path / "run")
    model = fastfpl.load(tmp_path / "run", model=clip)
    model.client(0)
    shutil.rmtree(tmp_path / "run" / "downloads")
    with pytest.raises(InputError, match="must be readable; got FileNotFoundError"):
        model.client(1)
    path = tmp_path / "run" / CHECKPOINT
    path.write_text(json.dumps({**json.loads(path.read_text()), "rounds_done": 4}))
    with pytest.raises(InputError, match=r"must not go on .* got 4 rounds where 3 .*: load it aga"):
        model.client(1)


@pytest.mark.parametrize("method", ["fedapt", "pfedmoap", "fedpgp"])
def test_a_client_on_another_device_is_the_same(method, played, clip):
    """The device is this one: what is built anew must hold what was loaded."""
    client = fastfpl.load(played(method)[0], model=clip).client(2)
    image = torch.nn.functional.normalize(torch.randn(3, clip.dim), dim=-1)
    assert torch.equal(client.moved(clip).logits(image), client.logits(image))


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
    model = fastfpl.load(tmp_path / "o", model=clip)
    assert (model.round, model.finished) == (1, False)
    with pytest.raises(InputError, match="the last round must have been evaluated"):
        model.client(0)


def test_what_was_really_used_is_said(played, clip):
    """The settings name the class of a model that was handed over, and its dtype; not tiny."""
    out, result, _ = played("promptfl")
    assert (result.settings["clip"], result.settings["pretrained"]) == ("CLIP", None)
    assert result.settings["dtype"] == "float32"
    assert result.data["weights"] == clip.weights_digest
    assert fastfpl.load(out, model=clip).settings.clip == "CLIP"
    assert Settings(method="promptfl").clip == "tiny"


def test_a_model_that_serves_everybody(played, clip):
    out, _, _ = played("promptfl")
    assert fastfpl.load(out, model=clip).global_model().name == "global"
    out, _, _ = played("fedotp")
    with pytest.raises(NotSupported, match=r"one model for everybody; got fedotp, whose clients"):
        fastfpl.load(out, model=clip).global_model()


@pytest.mark.parametrize("method", METHODS)
def test_text_features_are_the_whole_head_where_there_is_one(method, played, clip):
    out, _, _ = played(method)
    model = fastfpl.load(out, model=clip)
    # of pFedMoAP one whose gate has trained
    gated = [c for c, down in model.checkpoint.downloads.items() if "experts" in down]
    client = model.client(gated[0] if gated else 0)
    image = torch.nn.functional.normalize(torch.randn(3, clip.dim), dim=-1)
    plain = method not in ("fedotp", "fedapt", "fedapt-unsupervised", "pfedmoap")
    if not plain:
        with pytest.raises(NotSupported, match=f"got {method}, which (mixes|transports)"):
            client.text_features()
        return
    text = client.text_features()
    assert text.shape == (10, clip.dim)
    torch.testing.assert_close(client.logits(image), clip.logit_scale * image @ text.mT)


def test_other_classes(played, clip):
    out, _, _ = played("fedtpg")
    client = fastfpl.load(out, model=clip).global_model()
    other = client.on(["seven", "cat", "dog"])
    assert other.classnames == ("seven", "cat", "dog")
    image = torch.nn.functional.normalize(torch.randn(3, clip.dim), dim=-1)
    assert other.logits(image).shape == (3, 3)
    assert client.classnames == tuple(load_dataset("digits").classnames)
    with pytest.raises(InputError, match="names must be unique"):
        client.on(["cat", "cat"])


def test_features_are_held_to_their_shape(played, clip):
    out, _, _ = played("fedotp")
    client = fastfpl.load(out, model=clip).client(0)
    with pytest.raises(InputError, match=r"shape \(B, 16, 32\), those of fedotp; got \(2, 32\)"):
        client.logits(torch.randn(2, 32))
    with pytest.raises(KindError, match="tensor of floats; got"):
        client.logits(torch.ones(2, 16, 32, dtype=torch.int64))
    assert client.logits(torch.randn(0, 16, 32)).shape == (0, 10)


# -- images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(played, clip):
    return fastfpl.load(played("promptfl")[0], model=clip).global_model()


def test_images_in_every_form_are_the_same_image(client, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    image.save(tmp_path / "a.png")
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    image.save(tmp_path / "deep" / "B.PNG")
    (tmp_path / "deep" / "note.txt").write_text("no image")
    wanted = client.predict([rgb] * 2)
    first = torch.from_numpy(rgb).permute(2, 0, 1)
    for form in (
        [image, rgb],
        (tmp_path / "a.png", str(tmp_path / "deep")),
        tmp_path,
        str(tmp_path),
        np.stack([rgb, rgb]),
        first[None].repeat(2, 1, 1, 1),
        [first.float() / 255, rgb.astype(np.float32) / 255],
        [[image], [rgb.astype(np.uint16) * 257]],
        [np.dstack([rgb, rgb[..., :1]]), image.convert("RGBA")],
    ):
        said = client.predict(form)
        assert torch.equal(said.logits, wanted.logits)
        assert said.names == wanted.names
    assert client.predict(tmp_path).images == [
        str(tmp_path / "a.png"),
        str(tmp_path / "deep" / "B.PNG"),
    ]
    assert wanted.images == ["image 0", "image 1"]
    assert wanted.probabilities.shape == (2, 10)
    torch.testing.assert_close(wanted.probabilities.sum(dim=-1), torch.ones(2))
    ((best, share), (_, less)) = wanted.top(2)[0]
    assert best == wanted.names[0]
    assert share == wanted.probabilities[0].max() >= less


def test_modes_of_files(client, tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, (30, 30), dtype=np.uint8)
    wanted = client.predict(np.stack([grey] * 3, axis=-1)).logits
    for number, image in enumerate(
        (
            Image.fromarray(grey),
            Image.fromarray(grey).convert("RGBA"),
            Image.fromarray(grey).convert("LA"),
            Image.fromarray(grey.astype(np.uint16) * 257),
        )
    ):
        image.save(tmp_path / f"{number}.png")
        assert torch.equal(client.predict(tmp_path / f"{number}.png").logits, wanted), image.mode
        assert torch.equal(client.predict(image).logits, wanted), image.mode
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "c.tiff")
    assert torch.equal(client.predict(tmp_path / "c.tiff").logits, wanted)
    bits = Image.fromarray(grey > 99)
    bits.save(tmp_path / "bits.png")
    logits = client.predict([tmp_path / "bits.png", bits, grey > 99]).logits
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(KindError, match=r"f\.tiff must have pixels of 8 or 16 bits; got floats"):
        client.predict(tmp_path / "f.tiff")


@pytest.mark.parametrize(
    ("images", "kind", "sentence"),
    [
        ([], InputError, "must hold at least one; got"),
        (3, KindError, "must be paths, bytes, Pillow images, arrays, tensors or lists of these"),
        ([None], KindError, "lists of these; got NoneType"),
        ("no/such.png", Missing, "must be a file or a folder; got nothing at no/such.png"),
        (np.zeros((4, 4, 2), np.uint8), InputError, r"image 0 must have shape .*; got \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), InputError, "image 0 must have shape"),
        (np.zeros((4, 4, 3), np.int64), KindError, "must be uint8, uint16, bool or floats"),
        (np.full((4, 4, 3), 2.0), InputError, "not normalised by a mean; got values from 1 to 2"),
        (np.full((4, 4, 3), np.nan), InputError, "got values from nan to nan"),
        (torch.zeros(4, 4), InputError, r"a tensor must have shape .*; got \(4, 4\)"),
        ([np.zeros((4, 4), np.uint8), torch.zeros(2, 5, 4, 4)], InputError, "a tensor must have"),
    ],
)
def test_what_is_no_image_is_refused(images, kind, sentence, client):
    with pytest.raises(kind, match=sentence):
        client.predict(images)


def test_files_that_are_no_images_are_refused(client, tmp_path):
    with pytest.raises(Missing, match="a folder must hold image files"):
        client.predict(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(Damaged, match=r"a\.jpg must be an image; got"):
        client.predict(tmp_path / "a.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Damaged, match=r"b\.png must be an image; got"):
        client.predict(tmp_path / "b.png")


def test_statistics_of_the_data_set_and_storage_in_16_bits(clip, tmp_path, monkeypatch):
    """Pixels are normalised, and features rounded, as the run had them."""
    digits = load_dataset("digits")
    own = replace(digits, statistics=Statistics((0.4,) * 3, (0.2,) * 3))
    name = "load_dataset"
    monkeypatch.setattr(fastfpl.federation.preparation, name, lambda n, r, **more: own)
    settings = {**RUN, "rounds": 1, "statistics": "dataset", "feature_dtype": "float16"}
    out, cache = tmp_path / "o", tmp_path / "c"
    fastfpl.run("promptfl", model=clip, cache=cache, out=out, **settings)
    client = fastfpl.load(out, model=clip).global_model()
    assert client.eye.mean == (0.4, 0.4, 0.4)
    (exam,) = prepare(
        make_settings({"method": "promptfl", **settings}), model=clip, cache=cache
    ).examiner.exams
    at = np.unique(np.concatenate(exam.images))
    seen = client.image_features(list(digits.test.images(at)))
    assert torch.equal(seen, exam.feed.batch(at))
    other = replace(client.eye, mean=clip.mean, dtype=None)
    assert not torch.equal(
        other.encode(other.prepare.squares(digits.test.images(at[:3]))), seen[:3]
    )
