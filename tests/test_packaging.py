"""What is shipped: members of sdist and wheel, and that a wheel works away from this tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastfpl.errors import NotBuilt
from fastfpl.ops import native

ROOT = Path(__file__).resolve().parent.parent


def shell(*command, cwd, **environment):
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(source, out, *options, **environment):
    shell(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source,
        cwd=out, **environment,
    )  # fmt: skip


def members(archive):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return {n for n in file.namelist() if not n.endswith("/")}
    with tarfile.open(archive) as file:
        return {m.name.split("/", 1)[1] for m in file.getmembers() if m.isfile()}


def sources(tree, *patterns):
    """The files of a source tree that match, by their path from its root."""
    return {
        path.relative_to(tree).as_posix()
        for pattern in patterns
        for path in tree.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy without build products, so that builds do not meet each other or this tree."""
    copy = tmp_path_factory.mktemp("tree") / "fastfpl"
    products = shutil.ignore_patterns(
        ".git", ".venv", ".nox", ".*cache", ".hypothesis", ".ci", ".benchmarks", "__pycache__",
        "build", "dist", "*.egg-info", "*.so", "_C.missing.txt", "runs",
    )  # fmt: skip
    shutil.copytree(ROOT, copy, ignore=products)
    return copy


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """A compiler that does not optimise: what is shipped does not depend on it, and -O3 is slow."""
    script = tmp_path_factory.mktemp("hasty") / "c++"
    script.write_text('#!/bin/bash\nexec c++ "${@/#-O3/-O0}"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def built(tree, hasty, tmp_path_factory):
    """The sdist, and the wheel that is made from it."""
    out = tmp_path_factory.mktemp("dist")
    build(tree, out, FASTFPL_REQUIRE_NATIVE="1", CC=hasty, CXX=hasty)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def unpacked(wheel, folder):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run_in(site, code):
    """Run code with only ``site`` for fastfpl, away from this tree."""
    # an editable install of this checkout would lend its own _C and kernels to the unpacked wheel
    alone = (
        "import sys; sys.meta_path[:] = "
        "[f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']\n"
    )
    return shell(sys.executable, "-c", alone + code, cwd=site, PYTHONPATH=str(site)).strip()


@pytest.mark.slow
def test_sdist_holds_every_source(tree, built):
    found = members(built[0])
    expected = sources(
        tree, "csrc/**/*", "kernels/**/*.py", "fastfpl/**/*.py", "fastfpl/**/*.yaml",
        "fastfpl/**/*.html", "fastfpl/serving/*.*", "fastfpl/templates/**/*.txt",
        "fastfpl/clip/tiny/*", "tests/**/*.py", "bench/**/*.py",
    )  # fmt: skip
    expected |= {"setup.py", "pyproject.toml", "conftest.py", "LICENSE", "fastfpl/py.typed"}
    assert {"csrc/dlpack.h", "csrc/transport.cpp", "kernels/__init__.py"} <= expected
    assert expected - found == set()
    assert {n for n in found if n.endswith((".so", ".pyc", "_C.missing.txt"))} == set()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tree, built):
    found = members(built[1])
    expected = sources(
        tree, "fastfpl/**/*.py", "fastfpl/**/*.yaml", "fastfpl/**/*.html", "fastfpl/serving/*.*",
        "fastfpl/clip/tiny/*",
        "fastfpl/templates/**/*.txt",
    )  # fmt: skip
    expected |= {f"fastfpl/{name}" for name in sources(tree, "kernels/**/*.py")} | {
        "fastfpl/py.typed"
    }
    assert expected - found == set()
    extra = {n for n in found - expected if ".dist-info/" not in n}
    assert len(extra) == 1, extra
    assert extra.pop().startswith("fastfpl/_C.")


@pytest.mark.slow
def test_wheel_works_elsewhere(built, tmp_path):
    site = unpacked(built[1], tmp_path / "site")
    code = """
import fastfpl, fastfpl.kernels, fastfpl._C, torch
from fastfpl.ops import native, transport_plan
assert native.missing("transport_plan") == []
with fastfpl.face("cpu"):
    print(float(transport_plan(torch.eye(2), eps=.1, mass=.5).sum()))
print(fastfpl.__file__); print(fastfpl.kernels.__file__); print(fastfpl._C.__file__)
"""
    total, *files = run_in(site, code).splitlines()
    assert float(total) == pytest.approx(0.5)
    assert all(Path(file).is_relative_to(site) for file in files), files


@pytest.mark.slow
def test_a_broken_compiler_costs_only_the_compiled_faces(tree, tmp_path):
    broken = {"CXX": "/bin/false", "CC": "/bin/false", "FASTFPL_REQUIRE_NATIVE": "0"}
    build(tree, tmp_path, "--wheel", **broken)
    (wheel,) = tmp_path.glob("*.whl")
    assert not [n for n in members(wheel) if n.startswith("fastfpl/_C.") and "missing" not in n]
    shell(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
        "--target", tmp_path / "site", wheel, cwd=tmp_path,
    )  # fmt: skip
    code = """
import torch, fastfpl
from fastfpl.errors import NotBuilt, NotSupported
from fastfpl.ops import native, transport_plan
print(native.missing()[0])
try:
    native.load()
except NotBuilt as error:
    print(error)
print(float(transport_plan(torch.eye(2), eps=.1, mass=.5).sum()))
try:
    with fastfpl.face("cpu"):
        transport_plan(torch.eye(2))
except NotSupported as error:
    print(str(error).replace(chr(10), " "))
"""
    reason, error, total, refused = run_in(tmp_path / "site", code).splitlines()
    assert "fastfpl._C could not be compiled (CompileError: " in reason
    assert "/bin/false" in reason
    assert native.BUILD in reason
    assert native.BUILD in error
    assert native.BUILD in refused
    assert float(total) == pytest.approx(0.5)


@pytest.mark.slow
def test_a_required_compiler_must_work(tree, tmp_path):
    with pytest.raises(AssertionError, match=r"/bin/false.* exit"):
        build(
            tree, tmp_path, "--wheel",
            CXX="/bin/false", CC="/bin/false", FASTFPL_REQUIRE_NATIVE="1",
        )  # fmt: skip


def test_a_module_older_than_its_sources_is_named():
    if native.missing():
        pytest.skip("; ".join(native.missing()))
    assert native.load("transport_plan").transport_plan
    (reason,) = native.missing("op_of_tomorrow")
    assert reason.startswith("fastfpl._C is older than its sources: it lacks op_of_tomorrow")
    with pytest.raises(NotBuilt, match=r"op_of_tomorrow; rebuild it with .* pip install"):
        native.load("op_of_tomorrow")
