"""What is exported answers as the run does, in processes that know nothing of this library."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

import fastfpl
from fastfpl.cli import main
from fastfpl.errors import Differs, InputError, Missing, NotSupported
from fastfpl.methods import METHODS
from fastfpl.methods.promptfl import PromptFL
from fastfpl.reference.text import _transformed
from fastfpl.trained import export
from fastfpl.trained.program import _Program
from tests.warm import warm_python
from tests.worlds import GATE, TINY_RUN, small_clip

RUN = {**TINY_RUN, "local_epochs": 1, "threads": 1, "shots": 3}
OPTIONS = {
    "pfedmoap": GATE,
    "fedotp": {"tol": 1e-6, "max_iter": 1000},
    "promptfl-ft": {"epochs": 1},
    "fedapt-unsupervised": {"pseudo_rounds": 1, "threshold": 0.0},
}
ROOT = Path(__file__).resolve().parent.parent
MIXED = ("pfedmoap", "fedotp", "promptfolio", "fedapt", "fedapt-unsupervised")


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def client(clip, tmp_path_factory):
    """Give client 1 of a run of a method."""
    cache, known = tmp_path_factory.mktemp("features"), {}

    def of(method, **changes):
        key = repr((method, changes))
        if key not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            settings = {**RUN, "options": OPTIONS.get(method, {}), **changes}
            if METHODS[method].paired:
                settings["augment"] = "views:1"
            fastfpl.run(method, model=clip, cache=cache, out=out, **settings)
            known[key] = fastfpl.load(out, model=clip).client(1)
        return known[key]

    return of


def alone(code, *arguments):
    """Run Python without this library, and give what it prints."""
    guard = "assert not any(m.split('.')[0] == 'fastfpl' for m in sys.modules)"
    done = subprocess.run(
        [*warm_python(), "-c", f"import sys\n{code}\n{guard}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixels") / "pixels.npy"
    draw = np.random.default_rng(0)
    np.save(path, draw.integers(0, 256, (5, 3, 28, 28), dtype=np.uint8))
    return path


def said(client, pixels):
    return client.predict(torch.from_numpy(np.load(pixels))).logits


PROGRAM = """
import numpy, pathlib, torch
pixels = torch.from_numpy(numpy.load(sys.argv[1]))
for path in sorted(pathlib.Path(sys.argv[2]).glob("*.pt2")):
    program = torch.export.load(path).module()
    with torch.no_grad():
        whole = program(pixels)
        assert torch.allclose(program(pixels[:1]), whole[:1], atol=1e-4), path
    numpy.save(path.with_suffix(".npy"), whole.numpy())
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # load of torch 2.11
def test_programs_answer_as_the_clients(client, pixels, tmp_path):
    """All methods, read in one process; FedOTP as near to the optimum as its tolerance says."""
    loose = client("fedotp", options={"tol": 1e-3})
    clients = {method: (client(method), 1e-5) for method in METHODS} | {"loose": (loose, 1e-4)}
    for name, (one, _) in clients.items():
        out = export(one, "torch", tmp_path / f"{name}.pt2")
        extra = {"classnames.json": ""}
        torch.export.load(out, extra_files=extra)
        assert json.loads(extra["classnames.json"]) == list(one.classnames)
    alone(PROGRAM, pixels, tmp_path)
    for name, (one, most) in clients.items():
        mine = said(one, pixels).double().numpy()
        away = np.abs(np.load(tmp_path / f"{name}.npy") - mine).max()
        assert away <= most * max(1.0, one.eye.clip.logit_scale), (name, away)


HEADS = """
import json, numpy, pathlib, torch
from safetensors import safe_open
features = torch.from_numpy(numpy.load(sys.argv[1]))
for path in sorted(pathlib.Path(sys.argv[2]).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
        names = json.loads(file.metadata()["classnames"])
    logits = scale * torch.nn.functional.normalize(features, dim=-1) @ weight.T
    assert logits.shape[1] == len(names)
    numpy.save(path.with_suffix(".npy"), logits.numpy())
for path in sorted(pathlib.Path(sys.argv[2]).glob("*.pth")):
    state = torch.load(path, weights_only=True)
    parts = (state["prompt_learner." + n] for n in ("ctx", "token_prefix", "token_suffix"))
    ctx, before, behind = parts
    ctx = ctx.expand(len(behind), *ctx.shape)
    torch.save(torch.cat((before, ctx, behind), dim=1), path.with_suffix(".pt"))
"""


def test_heads_and_prompts_of_others(client, clip, pixels, tmp_path):
    """A classifier scores image features; CoOp's tensors encode to the same text features."""
    plain = [method for method in METHODS if method not in MIXED]
    slots = {}
    for method in plain:
        export(client(method), "classifier", tmp_path / f"{method}.safetensors")
        out = export(client(method), "coop", tmp_path / f"{method}.pth")
        slots[method] = len(torch.load(out, weights_only=True)["prompt_learner.ctx"])
    features = client("local").image_features(torch.from_numpy(np.load(pixels)))
    np.save(tmp_path / "features.npy", (3 * features).numpy())  # length does not count
    alone(HEADS, tmp_path / "features.npy", tmp_path)
    for method in plain:
        one = client(method)
        logits = np.load(tmp_path / f"{method}.npy")
        np.testing.assert_allclose(logits, said(one, pixels), atol=1e-5)
        prompts = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        eot = one.head.method.task.classes.layout(slots[method]).eot
        encoded = _transformed(clip.text, prompts + clip.text.positional, eot)
        torch.testing.assert_close(encoded, one.text_features(), atol=1e-5, rtol=1e-5)
    with safe_open(tmp_path / "local.safetensors", framework="pt") as file:
        meta = file.metadata()
        assert file.get_tensor("weight").norm(dim=-1).numpy() == pytest.approx(1, abs=1e-6)
    assert json.loads(meta["classnames"]) == list(one.classnames)
    assert (meta["clip"], meta["pretrained"], meta["image_size"]) == ("CLIP", "", "28")
    assert tuple(json.loads(meta["mean"])) == clip.mean
    assert tuple(json.loads(meta["std"])) == clip.std


@pytest.mark.parametrize("method", MIXED)
@pytest.mark.parametrize("to", ["classifier", "coop"])
def test_what_a_format_cannot_hold_is_refused_with_the_reason(method, to, client, tmp_path):
    reason = "mixes|transports|encodes"
    with pytest.raises(
        NotSupported, match=rf"got {method}, which ({reason}) .*; export it to torch"
    ):
        export(client(method), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refusals(client, clip, tmp_path, monkeypatch):
    one = client("promptfl")
    with pytest.raises(InputError, match="format must be known; got 'tensorflow'; known: class"):
        export(one, "tensorflow", tmp_path / "out")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(InputError, match=r"out must not be there yet; got .*there: name another"):
        export(one, "classifier", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Missing, match="onnx and onnxscript must be installed"):
        export(one, "onnx", tmp_path / "out")
    monkeypatch.setattr(
        _Program,
        "forward",
        lambda self, pixels: (
            pixels.float().mean((1, 2, 3))[:, None].expand(-1, 10) + self.mean[0, 0, 0]
        ),
    )
    with pytest.raises(Differs, match="must answer as the client; got logits that differ by"):
        export(one, "torch", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


class Odd(PromptFL):
    """Scores images by a number of theirs."""

    def logits(self, text, trained, fixed, image):
        return super().logits(text, trained, fixed, image) * (2 if image.sum() > 0 else 3)


def test_a_method_that_looks_at_values_is_refused(client, tmp_path):
    one = client("promptfl")
    odd = Odd(one.head.method.task)
    other = fastfpl.trained.Client("0", odd, one._down, one._own, one.eye)
    with pytest.raises(NotSupported, match="depend on no value; got"):
        export(other, "torch", tmp_path / "out")
    with pytest.raises(NotSupported, match="which scores images in a way of its own"):
        export(other, "classifier", tmp_path / "out")


def test_images_that_stop_together_have_no_program(client, tmp_path):
    one = client("fedotp", as_released="fedotp-batch-stop")
    with pytest.raises(NotSupported, match="which stops 100 images together"):
        export(one, "torch", tmp_path / "out")


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap", "fedapt", "fedotp"])
def test_onnx_answers_as_the_client(method, client, pixels, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    one = client(method)
    if method == "fedotp":
        with pytest.raises(NotSupported, match=r"form in ONNX; got .* for fedotp; export"):
            export(one, "onnx", tmp_path / "model.onnx")
        assert list(tmp_path.iterdir()) == []
        return
    out = export(one, "onnx", tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixels": np.load(pixels)})
    scale = one.eye.clip.logit_scale
    np.testing.assert_allclose(logits, said(one, pixels), atol=1e-5 * scale)


# -- on the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give runs on the embedded CLIP, which needs nobody to hand it over."""
    out = tmp_path_factory.mktemp("runs")
    same = {**RUN, "rounds": 1, "clip": "tiny"}
    for method in ("promptfl", "fedpgp"):
        fastfpl.run(method, out=out / method, cache=out / "cache", **same)
    image = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    (out / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(out / "images" / name)
    return out


@pytest.fixture
def called(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_predict_prints_a_table_and_writes_it(folder, tmp_path, called):
    code, shown, errors = called(
        *("predict", folder / "fedpgp", folder / "images", "--client", 2, "--top", 3),
        *("--csv", tmp_path / "said.csv"),
    )
    assert code == 0, errors
    one = fastfpl.load(folder / "fedpgp").client(2)
    best = one.predict(folder / "images").top(3)[0]
    lines = (tmp_path / "said.csv").read_text().splitlines()
    assert lines[0] == "image,rank,class,probability"
    first = [line.split(",") for line in lines[1:4]]
    assert [(rank, name) for _, rank, name, _ in first] == [
        (str(rank), name) for rank, (name, _) in enumerate(best, start=1)
    ]
    assert len(lines) == 1 + 2 * 3
    assert f"{best[0][0]} {100 * best[0][1]:.1f} %" in shown
    assert shown.count("a.png") == 1
    assert shown.splitlines()[-1] == str(tmp_path / "said.csv")
    # a model for everybody needs no client
    code, _, errors = called("predict", folder / "promptfl", folder / "images" / "a.png")
    assert code == 0, errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("predict", "fedpgp", "images"), "client must be named for fedpgp, whose clients"),
        (("predict", "fedpgp", "images", "--client", "4"), "client must be one of the 4, from 0"),
        (("predict", "fedpgp", "images", "--client", "Rome"), "nobody has joined it"),
        (("predict", "nothing", "images"), "folder must hold a run; got"),
        (("predict", "promptfl", "c.png"), "must be a file or a folder; got nothing at"),
        (("predict", "promptfl", "images", "--top", "0"), "top must be at least 1; got 0"),
        (("export", "promptfl", "--to", "coup", "--out", "x"), "did you mean 'coop'?"),
    ],
)
def test_bad_input_is_a_sentence(arguments, sentence, folder, tmp_path, called):
    places = ("promptfl", "fedpgp", "images", "nothing", "c.png", "x")
    given = [folder / a if a in places else a for a in arguments]
    more = ("--csv", tmp_path / "x.csv") if given[0] == "predict" else ()
    code, shown, errors = called(*given, *more)
    assert code == 2
    assert sentence in errors
    assert errors.count("\n") == 1
    assert shown == ""
    assert list(tmp_path.iterdir()) == []


def test_export_on_the_command_line(folder, tmp_path, called):
    out = tmp_path / "head.safetensors"
    done = called("export", folder / "fedpgp", "--client", 1, "--to", "classifier", "--out", out)
    assert done == (0, f"{out}\n", "")
    with safe_open(out, framework="pt") as file:
        weight = file.get_tensor("weight")
    assert torch.equal(weight, fastfpl.load(folder / "fedpgp").client(1).text_features())


def test_formats_are_completed():
    from fastfpl.cli.entry import group

    assert "classifier" in CliRunner().invoke(group, ["export", "--help"]).output


# -- the page ------------------------------------------------------------------------------------


def test_the_page_of_what_was_trained_runs(tmp_path, called, monkeypatch):
    """Every command and the Python of docs/trained.md, in their order."""
    page = (ROOT / "docs" / "trained.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"<!-- commands -->\n```bash\n(.*?)```", page, re.DOTALL)
    (code,) = re.findall(r"<!-- python -->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    Image.fromarray(image).save("photo.png")
    for line in commands.splitlines():
        name, *arguments = shlex.split(line, comments=True)
        assert name == "fastfpl"
        if arguments[0] == "serve":  # until it is stopped: test_serving.py
            continue
        done = called(*arguments)
        assert done[0] == 0, (line, done)
    names = {}
    exec(compile(code, "docs/trained.md", "exec"), names)  # the page's own lines
    assert names["other"].predict("photo.png").names[0] in ("seven", "cat", "sea horse")
    assert torch.equal(names["logits"], names["said"].logits)
    assert {p.name for p in tmp_path.iterdir()} >= {
        *("said.csv", "head.safetensors", "prompt.pth", "model.pt2"),
    }


OPEN_CLIP = """
import json, open_clip, torch
from open_clip.model import CLIP
from PIL import Image
from safetensors import safe_open
with safe_open(sys.argv[1], framework="pt") as file:
    weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
    said = file.metadata()
vision = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 1, "head_width": 16}
text = {"context_length": 24, "width": 32, "heads": 4, "layers": 2}
torch.manual_seed(0)
model = CLIP(32, vision, text).eval()
size, mean, std = (json.loads(said[name]) for name in ("image_size", "mean", "std"))
preprocess = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
with torch.no_grad():
    features = model.encode_image(preprocess(Image.open(sys.argv[2]))[None])
logits = scale * torch.nn.functional.normalize(features, dim=-1) @ weight.T
print(json.loads(said["classnames"])[logits.argmax()])
print(json.dumps(logits[0].tolist()))
"""


def test_open_clip_alone_classifies_the_same(client, tmp_path):
    one = client("fedpgp")
    image = np.random.default_rng(3).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    out = export(one, "classifier", tmp_path / "head.safetensors")
    name, logits = alone(OPEN_CLIP, out, tmp_path / "a.png").splitlines()
    mine = one.predict(tmp_path / "a.png")
    assert name == mine.names[0]
    # Pillow resizes there, torchvision here: to one level of 255 the same
    np.testing.assert_allclose(json.loads(logits), mine.logits[0], atol=0.1)
