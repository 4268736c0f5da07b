"""A client that joins may be killed at any moment: the run is readable, and it joins again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import fastfpl
from fastfpl.data import load_dataset
from fastfpl.federation.lock import LOCK
from fastfpl.trained import adapt
from tests.warm import warm_python
from tests.worlds import TINY_RUN, small_clip

ROOT = Path(__file__).resolve().parent.parent
RUN = {**TINY_RUN, "local_epochs": 1, "threads": 1, "shots": 2}

# one process loads the library; each of its children dies before another change of a file
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import fastfpl
from fastfpl.data import load_dataset
from fastfpl.trained import adapt
from tests.kills import killed_at
from fastfpl.data import load_dataset
from fastfpl.federation.lock import LOCK
from fastfpl.trained import adapt
from tests.worlds import small_clip

base, run, cache, step = json.loads(sys.argv[1])
digits, clip = load_dataset("digits"), small_clip()
images = digits.test.images(range(3))


def files(folder, but=()):
    found = {str(p.relative_to(folder)): p for p in Path(folder).rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in found.items() if not n.startswith(but)}


def join(out, at=0):
    def play(count):
        adapt(out, digits, name="late", model=clip, cache=cache, shots=1)
        Path(out + ".count").write_text(str(count()))
    return killed_at(out, at, play)


def logits(out, who):
    return fastfpl.load(out, model=clip).client(who).predict(images).logits


plain, before = logits(run, 0), files(run)
whole = base + "/whole"
shutil.copytree(run, whole)
assert join(whole) == 0
wanted, names = logits(whole, "late"), sorted(files(whole))
total = int(Path(whole + ".count").read_text())
said = []
for at in range(1, total + 1, step):
    out = f"{base}/o{at}"
    shutil.copytree(run, out)
    assert join(out, at) == signal.SIGKILL, at
    # the run is as it was, and can be asked
    left = files(out, (".lock", "joined"))
    assert left == before, at
    assert torch.equal(logits(out, 0), plain), at
    model = fastfpl.load(out, model=clip)
    said.append(list(model.joined))
    if model.joined:  # whoever is named is whole
        assert torch.equal(logits(out, "late"), wanted), at
        shutil.rmtree(out + "/joined")
    assert join(out) == 0, at
    assert torch.equal(logits(out, "late"), wanted), at
    assert sorted(files(out)) == names, (at, sorted(files(out)))
    shutil.rmtree(out)
print(json.dumps([total, said]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at files as Linux does")
def test_killed_before_any_change_of_a_file_a_client_joins_again(tmp_path: Path) -> None:
    """Every third here, FASTFPL_KILLS=1 for all."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    fastfpl.run("prompt-fedper", model=small_clip(), cache=cache, out=run, **RUN)
    step = int(os.environ.get("FASTFPL_KILLS", "3"))
    job = json.dumps([str(tmp_path), str(run), str(cache), step])
    done = subprocess.run(
        [*warm_python(), "-c", KILLED, job],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, said = json.loads(done.stdout)
    assert total > 12
    assert said[0] == []
    assert said == sorted(said)  # from one moment on it is there

    # what a killed run has left is named until that run is gone on with
    left = run / "clients" / "00000-00099.safetensors"
    left.write_bytes(b"half")
    (run / LOCK).write_text(f'fastfpl-run-1 1\n"clients/{left.name}"\n')
    adapt(run, load_dataset("digits"), name="later", model=small_clip(), cache=cache, shots=1)
    assert f'"clients/{left.name}"' in (run / LOCK).read_text().splitlines()
    assert left.read_bytes() == b"half"
    (run / "result.json").unlink()
    fastfpl.run("prompt-fedper", model=small_clip(), cache=cache, out=run, resume=True, **RUN)
    assert not left.exists()
    assert not (run / LOCK).exists()
    assert [p.stem for p in sorted((run / "joined").iterdir())] == ["later", "later"]
