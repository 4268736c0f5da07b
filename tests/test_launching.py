"""A launch that comes back is the launch that Triton would make."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastfpl.ops import launch

pytest.importorskip("triton")
from fastfpl.kernels import launching
from fastfpl.kernels.launching import cdiv, launched, power


class Kernel:
    """What Triton makes of a function, as far as `launched` knows it; every compilation is new."""

    arg_names = ("x", "count", "SCALE")
    compiles = True

    def __init__(self):
        self.found = []
        self.again = []

    def __getitem__(self, grid):
        def triton(*arguments, **constants):
            self.found.append((grid, arguments, constants))
            if not self.compiles:
                return None
            number = len(self.found)
            return Compiled(lambda *given: self.again.append((number, *given)))

        return triton


class Compiled:
    packed_metadata = ()

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return lambda *arguments: self.run(grid, *arguments)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(launching, "_INTERPRETED", False)
    monkeypatch.setattr(launching, "_known", {})
    # memory of the CPU begins at multiples of 64
    monkeypatch.setattr(launching, "_ALIGNED", 63)


def test_a_launch_that_comes_back_does_not_ask_triton():
    kernel, x, y = Kernel(), torch.ones(64), torch.ones(64)
    launched(kernel, 7, x, 5, SCALE=2.0, num_warps=4)
    # another's memory, and other programs
    for tensor, programs in ((x, 7), (y, 9)):
        launched(kernel, programs, tensor, 5, SCALE=2.0, num_warps=4)
    assert kernel.found == [((7,), (x, 5), {"SCALE": 2.0, "num_warps": 4})]
    assert [(n, grid, a.data_ptr(), *rest) for n, grid, a, *rest in kernel.again] == [
        (1, (7, 1, 1), x.data_ptr(), 5, 2.0),
        (1, (9, 1, 1), y.data_ptr(), 5, 2.0),
    ]


OTHERS = {
    "dtype": {"x": torch.ones(64, dtype=torch.float16)},
    "alignment": {"x": torch.ones(65)[1:]},
    "none": {"x": None},
    "one": {"count": 1},
    "float": {"count": 5.0},
    "no count": {"count": None},
    "scale": {"scale": 3.0},
    "warps": {"warps": 8},
    "kernel": {"kernel": Kernel()},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_any_other_launch_asks_triton(other):
    base = {"kernel": Kernel(), "x": torch.ones(64), "count": 5, "scale": 2.0, "warps": 4}
    kernels = {given["kernel"]: given for given in (base, base | other)}
    for given in (base, base | other):
        arguments = torch.ones(64), given["x"], given["count"]
        constants = {"SCALE": given["scale"], "num_warps": given["warps"]}
        launched(given["kernel"], 1, *arguments, **constants)
    assert sum(len(kernel.found) for kernel in kernels) == 2
    assert not any(kernel.again for kernel in kernels)


def test_another_device_asks_triton(monkeypatch):
    kernel, x = Kernel(), torch.ones(64)
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self, device=device: device)
        launched(kernel, 1, x, 5, SCALE=1.0)
    assert len(kernel.found) == 2
    assert [number for number, *_ in kernel.again] == [1, 2]


def test_what_is_not_compiled_is_not_kept():
    """As where launches are noted and not made."""
    kernel = Kernel()
    kernel.compiles = False
    for _ in range(3):
        launched(kernel, 1, torch.ones(64), 5, SCALE=1.0)
    assert len(kernel.found) == 3
    assert launching._known == {}


def test_launches_that_are_kept_are_few(monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 3)
    kernel, x = Kernel(), torch.ones(64)
    for count in (*range(2, 20), 19):
        launched(kernel, 1, x, count, SCALE=1.0)
        assert len(launching._known) <= 3
    assert len(kernel.found) == 18


def test_the_interpreter_is_always_asked(monkeypatch):
    monkeypatch.setattr(launching, "_INTERPRETED", True)
    kernel = Kernel()
    for _ in range(2):
        launched(kernel, 1, torch.ones(64), 5, SCALE=1.0)
    assert len(kernel.found) == 2


@pytest.mark.parametrize("size", [1, 3, 16])
def test_sizes_are_tritons(size):
    import triton

    for number in range(70):
        assert cdiv(number, size) == triton.cdiv(number, size)
        if number:
            assert power(number) == triton.next_power_of_2(number)
    assert power(0) == 1


@pytest.mark.parametrize(
    ("play", "kernels"),
    [
        ("rows", 6),
        pytest.param("attention", 4, marks=pytest.mark.slow),
        pytest.param("gate", 3, marks=pytest.mark.slow),
        pytest.param("transport", 2, marks=pytest.mark.slow),
    ],
)
def test_every_launch_is_tritons(play, kernels):
    """Same compiled kernel, programs and arguments: of odd sizes, ones, and views off the grid."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch_play", play],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert len(found["kernels"]) == kernels
    # the second half of them are all known
    assert found["launches"] // 2 <= found["back"] < found["launches"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or launch.interpreted(), reason="needs a card")
def test_launches_come_back_on_a_gpu():
    """Views off the allocator's grid between tensors on it, each equal to eager."""
    from fastfpl.kernels.text import norm_fwd

    weight = torch.randn(32, device="cuda")
    for count in (7, 16, 7, 16, 1, 7):
        for off in (0, 1, 0):
            x = torch.randn(count * 32 + off, device="cuda")[off:].view(count, 32)
            h = norm_fwd(x, weight, weight, 1e-5, None)[0]
            torch.testing.assert_close(h, torch.nn.functional.layer_norm(x, (32,), weight, weight))
