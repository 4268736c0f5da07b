"""CLIPs by name, tag, file, folder and hub: what is read, and what is told of the rest."""

import gzip
import json
import os
import pickle
import subprocess
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import fastfpl
import fastfpl.clip.loading
import fastfpl.clip.tiny
from fastfpl import system
from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.errors import Damaged, InputError, KindError, Missing
from tests.families import (
    SIDE,
    TEXT,
    VISION,
    encode,
    layout_of,
    make_open_clip,
    make_transformers,
    pixels_of,
    same_weights,
    scramble,
)


def test_random_weights_are_seeded_and_leave_the_generator(nano):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a, b = load_clip("nano", "random"), load_clip("nano", "random", seed=0)
    assert torch.equal(torch.rand(3), want)
    assert same_weights(a, b)
    assert a.weights_digest == b.weights_digest
    assert load_clip("nano", "random", seed=1).weights_digest != a.weights_digest
    assert a.text.activation == "gelu"
    quick = load_clip("nano", "random", quick_gelu=True)
    assert quick.text.activation == "quick_gelu"
    assert (a.name, a.pretrained) == ("nano", "random")


WRAPPERS = {
    "safetensors": lambda state: state,
    "pt": lambda state: state,
    "misnamed": lambda state: state,
    "ddp": lambda state: {"state_dict": under("module.", state), "epoch": 3, "name": "x"},
    "compiled": lambda state: {"model": under("_orig_mod.", state), "step": 3},
    "compiled in ddp": lambda state: {"model": under("module._orig_mod.", state)},
    "compiled tower": lambda state: {
        k.replace("visual.", "visual._orig_mod."): v for k, v in state.items()
    },
    "lightning": lambda state: {"state_dict": under("model.", state), "global_step": 3},
    "in a class of its own": lambda state: {"model_state_dict": under("backbone.clip.", state)},
    "twice": lambda state: {"model": {"state_dict": state}},
}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_checkpoints_load(nano, tmp_path, kind):
    model = scramble(make_open_clip())
    state = WRAPPERS[kind](model.state_dict())
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    (save_file if kind in ("safetensors", "misnamed") else torch.save)(state, path)
    with pytest.warns(
        UserWarning, match=r"weights .* do not say their activation .* of openai need"
    ):
        clip = load_clip("nano", path)
    assert same_weights(clip, load_clip(model))
    assert clip.text.activation == "gelu"
    assert load_clip("nano", str(path), quick_gelu=False).weights_digest == clip.weights_digest
    quick = load_clip("nano", str(path), quick_gelu=True)
    assert quick.text.activation == "quick_gelu"
    assert quick.weights_digest != clip.weights_digest


def test_a_run_says_which_activation_it_took(nano, tmp_path):
    torch.save(scramble(make_open_clip()).state_dict(), tmp_path / "w.pt")
    more = {"dataset": "digits", "clients": 2, "clip": "nano", "pretrained": tmp_path / "w.pt"}
    seen = {}
    for answer in ("yes", "no", False):
        result = fastfpl.run("zeroshot", quick_gelu=answer, cache=tmp_path / "cache", **more)
        seen[answer] = (result.settings["quick_gelu"], result.data["activation"])
        seen[result.data["weights"]] = None
    assert seen["yes"] == ("yes", "quick_gelu")
    assert seen["no"] == seen[False] == ("no", "gelu")
    assert len(seen) == 3 + 2, "another activation is another digest"
    with pytest.raises(InputError, match="quick_gelu must be left out with a model that is loaded"):
        fastfpl.run("zeroshot", quick_gelu="yes", dataset="digits", model=load_clip("tiny"))


def test_prefixes_that_are_not_taken_off_are_named(nano, tmp_path):
    path = tmp_path / "w.pt"
    state = under("net.", make_open_clip().state_dict())
    torch.save({**state, "loss.weight": torch.zeros(1)}, path)
    with pytest.raises(
        InputError,
        match=r"names lie under the prefix 'net\.', beside 'loss\.weight': save those alone$",
    ):
        load_clip("nano", path)
    torch.save({"model": state, "state_dict": state}, path)
    with pytest.raises(
        InputError, match=r"must hold one state dict; got .*'state_dict' and 'model'"
    ):
        load_clip("nano", path)
    state["net.ln_final.bias"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(
        InputError, match=r"shape of ln_final\.bias \(3,\), under the prefix 'net\.'$"
    ):
        load_clip("nano", path)


def transformers_folder(folder, act="quick_gelu"):
    model = scramble(make_transformers(act))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 49408
    (folder / "config.json").write_text(json.dumps(config))
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_folders_of_transformers_load(nano, tmp_path, act):
    model = transformers_folder(tmp_path, act)
    want = load_clip(model)
    clip = load_clip(f"local-dir:{tmp_path}")
    torch.testing.assert_close(encode(clip), encode(want), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        clip.encode_image_tokens(pixels_of()), want.encode_image_tokens(pixels_of())
    )
    assert (clip.text.activation, clip.mean, clip.std) == (act, (0.1, 0.2, 0.3), (0.5,) * 3)
    # under a name of open_clip, the folder or the file in it still tells the activation
    config = open_clip.factory._MODEL_CONFIGS["nano"]
    config["text_cfg"] = {**TEXT, "mlp_ratio": 72 / 32, "norm_kwargs": {"eps": 1e-4}}
    config["vision_cfg"] = {**VISION, "mlp_ratio": 2.0}
    for path in (tmp_path, tmp_path / "model.safetensors"):
        named = load_clip("nano", path)
        assert (named.text.activation, named.mean) == (act, (0.1, 0.2, 0.3))
        assert same_weights(named, clip)
    # elsewhere it does not
    moved = (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.warns(UserWarning, match="do not say their activation"):
        load_clip("nano", moved)
    assert load_clip(f"local-dir:{tmp_path}", "random").text.activation == act


def test_folders_of_open_clip_load(nano, tmp_path):
    model = scramble(make_open_clip(quick_gelu=True))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": {**nano, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.1] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    clip = load_clip(f"local-dir:{tmp_path}")
    assert same_weights(clip, load_clip(model))
    assert (clip.text.activation, clip.mean) == ("quick_gelu", (0.1,) * 3)
    assert clip.name == f"local-dir:{tmp_path}"
    assert load_clip("nano", tmp_path).text.activation == "quick_gelu"
    with pytest.raises(InputError, match=r"pretrained must be None or 'random' for 'local-dir:"):
        load_clip(f"local-dir:{tmp_path}", "openai")
    with pytest.raises(InputError, match=r"; a folder is 'local-dir:"):
        load_clip(str(tmp_path))
    nano["quick_gelu"] = True
    config["model_cfg"]["quick_gelu"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quick_gelu must be given where name and origin disagree"):
        load_clip("nano", tmp_path)


def test_folders_and_configs_that_are_refused(tmp_path):
    name = f"local-dir:{tmp_path}"
    config = tmp_path / "config.json"
    with pytest.raises(
        Missing, match=r"must be 'local-dir:' and a folder; got no folder .*nowhere"
    ):
        load_clip(f"{name}/nowhere")
    with pytest.raises(
        Missing, match=r"must hold open_clip_config\.json, or config\.json of trans"
    ):
        load_clip(name)
    for text, said in (
        ("{", "must be JSON; got JSONDecodeError"),
        ("[" * 100_000, "must be JSON; got RecursionError"),
        ("[]", "must be a JSON object; got list"),
        ('{"model_type": "owlvit"}', "of transformers' CLIPModel; got model_type 'owlvit'"),
        ('{"model_type": "clip", "text_config": 3}', "config .* must be one of open_clip or of"),
        ('{"model_type": "clip", "text_config": {"hidden_act": "silu"}}', "quick_gelu and silu"),
        ('{"model_type": "clip", "vision_config": {"num_attention_heads": 0}}', "must be one of"),
        ('{"model_cfg": {}}', "must be one of open_clip or of transformers' CLIPModel"),
        (
            '{"model_cfg": {"text_cfg": {}, "vision_cfg": {}}}',
            "must be one that open_clip can build",
        ),
    ):
        config.write_text(text)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises((Damaged, InputError, KindError), match=said):
            load_clip(name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        Missing, match=r"must hold its weights as open_clip_model\.safetensors, .*none"
    ):
        load_clip("ViT-B-32", tmp_path)


def test_the_hub_is_asked_by_name(nano, tmp_path, monkeypatch):
    model = transformers_folder(tmp_path)

    def download(repo, filename=None):
        assert repo == "somebody/clip"
        path = tmp_path / (filename or "open_clip_model.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name}\nand a long story")
        return str(path)

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
    clip = load_clip("hf-hub:somebody/clip")
    torch.testing.assert_close(encode(clip), encode(load_clip(model)), rtol=0, atol=1e-6)
    assert (clip.name, clip.pretrained, clip.mean) == ("hf-hub:somebody/clip", "", (0.1, 0.2, 0.3))
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        Missing,
        match=r"model 'hf-hub:somebody/clip' must be at hand or in reach; got FileNotFoundError: "
        r'no config\.json; .* load_clip\("local-dir:/path/to/folder"\)$',
    ):
        load_clip("hf-hub:somebody/clip")


def test_the_place_of_a_file_tells_its_tag(tmp_path):
    from fastfpl.clip.origins import origin_of

    def quick(model, *parts):
        return origin_of(tmp_path.joinpath(*parts), model).quick_gelu

    hub = "models--timm--vit_base_patch16_clip_224.openai"
    assert quick("ViT-B-16", hub, "snapshots", "0a1b", "open_clip_model.safetensors") is True
    assert quick("ViT-B-16", "vit_base_patch16_clip_224.metaclip_400m", "w.safetensors") is True
    hub = "models--laion--CLIP-ViT-B-16-laion2B-s34B-b88K"
    assert quick("ViT-B-16", hub, "snapshots", "0a1b", "open_clip_model.safetensors") is False
    assert quick("ViT-B-32", "vit_b_32-quickgelu-laion400m_e31-d867053b.pt") is True
    assert quick("ViT-B-16", "vit_b_16-laion400m_e31-00efa78f.pt") is False
    # may be anybody's
    assert quick("ViT-B-16", "ViT-B-16.pt") is None
    assert quick("ViT-B-16", "mine.pt") is None


def test_openai_archives_know_their_activation(nano, tmp_path):
    state = scramble(make_open_clip()).state_dict()
    torch.save({**state, "input_resolution": torch.tensor(SIDE)}, tmp_path / "w.pt")
    assert load_clip("nano", tmp_path / "w.pt").text.activation == "quick_gelu"


def test_openai_tag_implies_quick_gelu(nano, tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    torch.save(scramble(make_open_clip()).state_dict(), path)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: str(path))
    clip = load_clip("nano")
    assert (clip.pretrained, clip.text.activation, clip.mean) == (
        "openai",
        "quick_gelu",
        (0.5,) * 3,
    )
    other = load_clip("nano", "laion")
    assert (other.text.activation, other.std) == ("gelu", (0.25,) * 3)
    assert same_weights(clip, load_clip("nano", path, quick_gelu=True))
    with pytest.raises(InputError, match=r"quick_gelu must be None or True for the tag 'openai'"):
        load_clip("nano", quick_gelu=False)
    for name in open_clip.list_openai_models():
        assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"]


def test_weights_out_of_reach_name_the_cure(nano, monkeypatch):
    def fail(facts):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(
        Missing,
        match=r"^fastfpl\.load_clip: weights 'openai' of 'nano' must be .*; got OSError: no route "
        r"to host; .*load_clip\('nano', pretrained=\"/path/to/weights.safetensors\", "
        r"quick_gelu=True\) or --quick-gelu yes$",
    ):
        load_clip("nano")


def other_files(folder):
    """Yield files that are no weights, and what is said of them."""
    path = folder / "text.bin"
    for data, said in (
        (b"", "got an empty file"),
        (b"just a text about weights\n", "a file that begins with b'just a text"),
        (b"\x00" * 4096, r"a file that begins with b'\\x00"),
        (b"\x80\x02", "must be readable; got"),
        (b"\x80\x02Kzq\x00h\x05.", "must be readable; got|must hold tensors only"),
        (b"PK\x03\x04" + b"\x00" * 99, "must be readable; got BadZipFile"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "must be a safetensors file; got"),
    ):
        path.write_bytes(data)
        yield path, said
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    yield path, "got a zip archive of readme.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", "no pickle")
    yield path, "must be readable; got|must hold tensors only"
    text = folder / "text.safetensors"
    text.write_text("no weights either")
    yield text, "must be a safetensors file; got"
    whole = folder / "whole.safetensors"
    save_file({"a": torch.zeros(99)}, whole)
    data = whole.read_bytes()
    for size in (3, 20, len(data) - 5):
        text.write_bytes(data[:size])
        yield text, "must be a safetensors file; got"


def test_files_that_are_no_weights_are_told(nano, tmp_path):
    for path, said in other_files(tmp_path):
        for name in ("nano", "ViT-B-32"):
            with pytest.raises((Damaged, InputError), match=rf"^fastfpl\.load_clip: .*({said})"):
                load_clip(name, path)
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(Missing, match=r"is there, but is no file '.*fifo\.pt'"):
        load_clip("nano", tmp_path / "fifo.pt")
    for name in ("nul\0.pt", "x" * 300 + ".pt"):
        with pytest.raises(Missing, match="no file"):
            load_clip("nano", name)
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"must hold tensors by name, .* with no tensor"):
        load_clip("nano", tmp_path / "w.pt")
    torch.save({"model": {"a": torch.zeros(1), "b": 3}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"must hold tensors by name, .* with 'b' of int"):
        load_clip("nano", tmp_path / "w.pt")


@pytest.mark.skipif(system.WINDOWS or os.geteuid() == 0, reason="who asks may read everything")
def test_files_of_others_are_told(nano, tmp_path):
    path = tmp_path / "w.pt"
    path.touch(mode=0)
    with pytest.raises(Damaged, match="must be readable; got PermissionError"):
        load_clip("nano", path)


def test_files_that_are_refused(nano, tmp_path):
    path = tmp_path / "w.pt"
    with pytest.raises(Missing, match=r"no file '.*w\.pt'"):
        load_clip("nano", path)
    path.write_bytes(pickle.dumps(subprocess.Popen))
    with pytest.raises(InputError, match=r"must hold tensors only; got .*w\.pt"):
        load_clip("nano", path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(InputError, match="must hold tensors by name"):
        load_clip("nano", path)
    state = make_open_clip().state_dict()
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises((Damaged, InputError), match=r"fastfpl\.load_clip"):
        load_clip("nano", path)
    bad = path.with_suffix(".safetensors")
    bad.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(Damaged, match="must be a safetensors file"):
        load_clip("nano", bad)
    torch.save({k: v for k, v in state.items() if k != "ln_final.bias"}, path)
    with pytest.raises(InputError, match=r"must fit the model; got no ln_final\.bias"):
        load_clip("nano", path)
    torch.save({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="got unknown extra"):
        load_clip("nano", path)
    torch.save({**state, "ln_final.bias": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"got another shape of ln_final\.bias \(3,\)"):
        load_clip("nano", path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_programs_are_refused(nano, tmp_path):
    script = torch.jit.script(nn.Linear(2, 2))
    torch.jit.save(script, tmp_path / "w.pt")
    with pytest.raises(InputError, match="a TorchScript archive, which is a program"):
        load_clip("nano", tmp_path / "w.pt")
    with pytest.raises(KindError, match="must be a plain module; got a TorchScript one"):
        load_clip(script)


def test_names_are_suggested():
    with pytest.raises(
        InputError,
        match=r"^fastfpl\.load_clip: name must be 'tiny' or a model of open_clip; got 'ViT-B16'; "
        r"did you mean 'ViT-B-16'",
    ):
        load_clip("ViT-B16")
    with pytest.raises(InputError, match=r"hub is 'hf-hub:openai/clip-vit-base-patch16'$"):
        load_clip("openai/clip-vit-base-patch16")
    with pytest.raises(
        InputError, match=r"tag of 'ViT-B-16'.*; got 'opnai'; did you mean 'openai'"
    ):
        load_clip("ViT-B/16", "opnai")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coca_ViT-B-32", "a captioning model"),
        ("roberta-ViT-B-32", "text tower 'roberta-base' of transformers"),
    ],
)
def test_other_text_towers_are_refused_by_name(name, said):
    with pytest.raises(KindError, match=f"CLIP's text transformer; got '{name}' with .*{said}"):
        load_clip(name, "random")


def test_tiny_names_its_script_and_loads_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fastfpl.clip.tiny, "TINY", tmp_path)
    with pytest.raises(Missing, match=r"python -m fastfpl\.clip\.train_tiny makes it"):
        load_clip("tiny")
    merges = "#version: tiny\n" + "\n".join(["c a", "ca t</w>", "h o"])
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(merges.encode()))
    vocabulary = 512 + 3 + 2
    config = {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": vocabulary}}
    model = scramble(fastfpl.clip.tiny.build_tiny(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for text in (config, {"model_cfg": config, "preprocess_cfg": {"mean": [0, 0, 0]}}):
        (tmp_path / "config.json").write_text(json.dumps(text))
        clip = load_clip("tiny")
    assert isinstance(clip, FrozenCLIP)
    assert (clip.name, clip.mean, clip.eot) == ("tiny", (0.0, 0.0, 0.0), vocabulary - 1)
    assert len(clip.tokenize(["cat"])[0]) == 1
    with torch.no_grad():
        want = F.normalize(model.encode_text(layout_of(clip, ["cat", "hot"]).tokens), dim=-1)
    torch.testing.assert_close(encode(clip, ["cat", "hot"]), want, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="pretrained must be None or 'random' for 'tiny'"):
        load_clip("tiny", "openai")
