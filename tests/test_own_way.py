"""From a person's folder to a classifier that others use: the README's commands as they stand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import fastfpl
from fastfpl.cli.new import write_method
from fastfpl.clip.tiny import tiny_weights
from fastfpl.methods.own import KNOWN
from tests.own_trees import VENDORS, WORDS, draw, table, vendors
from tests.pages import command
from tests.warm import warm_python

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a person has: drawings of four vendors, a new one, and a vendor that comes late."""
    where = tmp_path_factory.mktemp("person")
    vendors(where / "emoji")
    Image.fromarray(draw("heart", 2, 20)).save(where / "heart.png")
    for name, word in WORDS.items():
        (where / "more" / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(draw(word, 4, number)).save(where / "more" / name / f"{number}.png")
    # where open_clip looks for a model that it does not know by name
    (where / "clip").mkdir()
    shutil.copy(tiny_weights(), where / "clip" / "open_clip_model.safetensors")
    config = tiny_weights().with_name("config.json")
    shutil.copy(config, where / "clip" / "open_clip_config.json")
    return where


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


CLASSIFY = """
import json, open_clip, sys, torch
from PIL import Image
from safetensors import safe_open
with safe_open(sys.argv[1], framework="pt") as file:
    weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
    classnames = json.loads(file.metadata()["classnames"])
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:clip")
with torch.no_grad():
    features = model.eval().encode_image(preprocess(Image.open(sys.argv[2]))[None])
logits = scale * torch.nn.functional.normalize(features, dim=-1) @ weight.T
assert not [name for name in sys.modules if name.startswith("fastfpl")]
print(json.dumps(dict(zip(classnames, logits.softmax(-1)[0].tolist()))))
"""


def classified(head: str, image: str) -> dict[str, float]:
    """Ask open_clip alone, in a process that has never heard of fastfpl."""
    done = subprocess.run(
        [*warm_python(), "-c", CLASSIFY, head, image],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def heads(head: str, client) -> None:
    """An exported head, over open_clip's features of the same model, answers as the client."""
    import open_clip

    with safe_open(head, framework="pt") as file:
        weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:clip")
    with torch.no_grad():
        features = model.eval().encode_image(preprocess(Image.open("heart.png"))[None])
    logits = scale * torch.nn.functional.normalize(features, dim=-1) @ weight.T
    mine = client.predict("heart.png")
    assert mine.classnames[int(logits.argmax())] == mine.names[0]
    torch.testing.assert_close(logits.softmax(-1), mine.probabilities, rtol=0, atol=0.01)


# six commands and a process of another program
@pytest.mark.slow
def test_the_readme_s_commands_lead_to_a_classifier(folder: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Your own images\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) <= 6
    assert all(line.startswith("fastfpl ") for line in lines)
    # a server that runs until it is stopped has tests of its own
    ending = [line for line in lines if not line.startswith("fastfpl serve ")]
    said = {line.split()[1]: command(line) for line in ending}
    assert set(said) == {"data", "run", "predict", "export", "adapt"}
    assert "client/class" in said["data"]
    assert all(name in said["run"] for name in VENDORS)
    result = json.loads((folder / "runs/emoji/result.json").read_text("utf-8"))
    assert result["data"]["clients"] == list(VENDORS)
    # the same answer from the library, the command and open_clip
    mine = fastfpl.load("runs/emoji").client("samsung").predict("heart.png")
    assert re.search(rf"heart\.png\s+{mine.names[0]} \d", said["predict"])
    theirs = classified("head.safetensors", "heart.png")
    assert max(theirs, key=theirs.__getitem__) == mine.names[0]
    ours = dict(zip(mine.classnames, mine.probabilities[0].tolist(), strict=True))
    assert theirs == pytest.approx(ours, abs=0.01)
    assert re.search(r"late: \d+ training images", said["adapt"])
    late = command("fastfpl predict runs/emoji more/red_heart/0.png --client late --top 1")
    assert "more/red_heart/0.png" in late


@pytest.mark.slow
def test_the_same_for_a_manifest(folder: Path) -> None:
    rows = [
        {
            "path": p.relative_to(folder).as_posix(),
            "label": p.parts[-2].replace("_", " "),
            "client": p.parts[-3],
        }
        for p in sorted((folder / "emoji").rglob("*.png"))
    ]
    table(folder / "list.csv", rows)
    for line in (
        "fastfpl data check manifest:list.csv",
        "fastfpl run promptfl --dataset manifest:list.csv --partition given --rounds 1 "
        "--out runs/list",
        "fastfpl predict runs/list heart.png",
        "fastfpl export runs/list --to classifier --out list.safetensors",
        "fastfpl adapt runs/list --dataset folder:more --client-name late",
        "fastfpl predict runs/list heart.png --client late",
    ):
        assert command(line)
    heads("list.safetensors", fastfpl.load("runs/list").global_model())


@pytest.mark.slow
def test_the_same_for_a_method_in_a_file(folder: Path) -> None:
    """Run, resume, report, predict and adapt; the file lies outside the package."""
    write_method("fed-half", folder / "fed-half")
    spec = "fed-half/fed_half.py:FedHalf"
    run = f"fastfpl run {spec} --dataset folder:emoji --partition given --out runs/half"
    try:
        command(f"{run} --rounds 1")
        command(f"{run} --rounds 2 --resume")
        assert "fed-half" in command("fastfpl report runs/half")
        result = json.loads((folder / "runs/half/result.json").read_text("utf-8"))
        assert (result["method"], len(result["rounds"])) == ("fed-half", 2)
        said = command(f"fastfpl predict runs/half heart.png --client 1 --method {spec}")
        assert "heart.png" in said
        command(
            f"fastfpl export runs/half --client 1 --to classifier --out half.safetensors "
            f"--method {spec}"
        )
        heads("half.safetensors", fastfpl.load("runs/half", method=spec).client(1))
        adapt = f"fastfpl adapt runs/half --dataset folder:more --client-name late --method {spec}"
        assert re.search(r"late: \d+ training images", command(adapt))
    finally:
        KNOWN.pop("fed-half", None)
