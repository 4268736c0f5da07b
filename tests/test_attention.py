"""Attention behind a shared prefix: every face against one sequence after another."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastfpl
from fastfpl.errors import InputError, KindError, NotSupported
from fastfpl.ops import native, prefix_attention
from fastfpl.ops.attention import FACES
from tests.truth import assert_as_good_as_eager, assert_fences_hold, fenced
from tests.warm import warm_python

pytestmark = pytest.mark.usefixtures("_bfloat16_rounds")
COMPILED = [f.name for f in FACES["prefix_attention"] if f.name in ("triton", "cpu")]
FAST = [*COMPILED, "torch"]
#: groups, shared, segment lengths, heads, numbers a head
SIZES = {
    "one": (1, 0, (1,), 1, 32),
    "no prefix": (2, 0, (3, 1, 7), 2, 32),
    "papers": (2, 16, (3, 4, 3, 5, 9, 3, 3), 2, 64),
    "long prefix": (1, 35, (2, 1), 1, 80),
    "over a tile": (1, 4, (40, 33, 76, 1, 2), 1, 32),
    "wide head": (1, 5, (3, 2), 1, 128),
    "odd head": (3, 3, (2, 6, 1), 3, 20),
}


def case(name: str, dtype: torch.dtype, sos: bool = True, bias: bool = True) -> dict:
    groups, shared, lengths, heads, size = SIZES[name]
    draw = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    width = heads * size
    return {
        "qkv": normal(groups, shared + sum(lengths), 3 * width),
        "heads": heads,
        "shared": shared,
        "starts": (0, *itertools.accumulate(lengths)),
        "bias": 0.3 * normal(3 * width) if bias else None,
        "sos": normal(2, width) if sos else None,
    }


def wide(given_: dict) -> dict:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in given_.items()}


def step(face: str, last_only: bool, qkv: Tensor, **rest) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    with fastfpl.face(face):
        mixed = prefix_attention(leaf, last_only=last_only, **rest)
    weight = torch.linspace(-1, 2, mixed.numel(), dtype=torch.float64).reshape(mixed.shape)
    (gradient,) = torch.autograd.grad(mixed, leaf, weight.to(mixed.dtype))
    return mixed.detach(), gradient


def flat(shown: dict) -> None:
    """The inputs exercise the op: no softmax is flat or one-hot."""
    q, k, _ = shown["qkv"].double().chunk(3, dim=-1)
    size = q.shape[-1] // shown["heads"]
    score = (q[..., :size] @ k[..., :size].mT) * size**-0.5
    weight = score.softmax(-1).amax(-1)
    if score.shape[-1] > 3:
        assert 1.5 / score.shape[-1] < weight.median() < 0.95


@pytest.mark.parametrize("face", FAST)
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_reference(size, last_only, face):
    given_ = case(size, torch.float64)
    flat(given_)
    truth = step("reference", last_only, **given_)
    for mine, exact in zip(step(face, last_only, **given_), truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("face", FAST)
@pytest.mark.parametrize(("sos", "bias"), [(False, True), (True, False), (False, False)])
def test_without_sos_or_bias(face, sos, bias):
    for size in ("papers", "no prefix"):
        given_ = case(size, torch.float64, sos, bias)
        truth = step("reference", False, **given_)
        for mine, exact in zip(step(face, False, **given_), truth, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("face", COMPILED)
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["papers", "over a tile", "odd head"])
def test_as_good_as_eager(size, dtype, last_only, face):
    given_ = case(size, dtype)
    truth = step("reference", last_only, **wide(given_))
    eager = step("torch", last_only, **given_)
    for name, mine, plain, exact in zip(
        ("mixed", "d_qkv"), step(face, last_only, **given_), eager, truth, strict=True
    ):
        assert_as_good_as_eager(mine, plain, exact, name=name)


@pytest.mark.parametrize("face", FAST)
def test_gradcheck(face):
    given_ = case("odd head", torch.float64)
    leaf = given_.pop("qkv")[:1].requires_grad_()
    with fastfpl.face(face):
        for last_only in (False, True):
            torch.autograd.gradcheck(
                lambda x, last_only=last_only: prefix_attention(x, last_only=last_only, **given_),
                leaf,
                fast_mode=True,
            )


@pytest.mark.parametrize("face", COMPILED)
def test_the_gradient_handed_in_may_be_a_view(face):
    given_ = case("odd head", torch.float64)
    leaf = given_.pop("qkv").requires_grad_()
    with fastfpl.face(face):
        mixed = prefix_attention(leaf, **given_)
    row = torch.linspace(-1, 2, mixed.shape[-1], dtype=torch.float64)
    views = row.expand_as(mixed), row.expand_as(mixed).contiguous()
    expanded, plain = (torch.autograd.grad(mixed, leaf, v, retain_graph=True)[0] for v in views)
    assert torch.equal(expanded, plain)


@pytest.mark.parametrize("face", COMPILED)
@pytest.mark.parametrize("last_only", [False, True])
def test_reads_stay_inside(face, last_only):
    given_ = case("odd head", torch.float32)
    plain = step(face, last_only, **given_)
    walled = {k: fenced(v) if isinstance(v, Tensor) else v for k, v in given_.items()}
    for mine, other in zip(step(face, last_only, **walled), plain, strict=True):
        assert torch.equal(mine, other)
    for tensor in walled.values():
        if isinstance(tensor, Tensor):
            assert_fences_hold(tensor)


@pytest.mark.parametrize("face", FAST)
def test_queries_that_are_none_are_not_read(face):
    given_ = case("papers", torch.float64)
    truth = step(face, True, **given_)
    last = given_["shared"] + torch.tensor(given_["starts"][1:]) - 1
    others = torch.ones(given_["qkv"].shape[1], dtype=torch.bool)
    others[last] = False
    width = given_["qkv"].shape[-1] // 3
    given_["qkv"][:, others, :width] = float("nan")
    mixed, gradient = step(face, True, **given_)
    assert torch.equal(mixed, truth[0])
    torch.testing.assert_close(gradient[..., width:], truth[1][..., width:])
    assert torch.equal(gradient[:, last], truth[1][:, last])


@pytest.mark.parametrize("face", FAST)
def test_views_and_leading_dimensions(face):
    given_ = case("papers", torch.float64)
    qkv = given_.pop("qkv")
    with fastfpl.face(face):
        plain = prefix_attention(qkv, **given_)
        strided = torch.stack((qkv, qkv), dim=-1)[..., 0]
        assert not strided.is_contiguous()
        torch.testing.assert_close(prefix_attention(strided, **given_), plain, rtol=0, atol=1e-14)
        lead = prefix_attention(qkv[None].expand(2, *qkv.shape), **given_)
        torch.testing.assert_close(lead[1], plain, rtol=0, atol=1e-14)
        none = prefix_attention(qkv[:0], **given_)
        assert none.shape == (0, *plain.shape[1:])
        shape = (0, 3, *qkv.shape[1:])
        empty = qkv.new_empty(shape, requires_grad=True)
        prefix_attention(empty, **given_).sum().backward()
        assert empty.grad.shape == shape


@pytest.mark.parametrize("face", COMPILED)
def test_same_bits_in_every_run(face):
    given_ = case("over a tile", torch.float32)
    runs = [step(face, False, **given_) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        runs.append(step(face, False, **given_))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@given(
    groups=st.integers(1, 3),
    shared=st.integers(0, 20),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    last_only=st.booleans(),
    seed=st.integers(0, 99),
)
def test_laws(groups, shared, lengths, last_only, seed):
    """A segment's rows do not depend on other segments, nor a group's on other groups."""
    draw = torch.Generator().manual_seed(seed)
    qkv = torch.randn(groups, shared + sum(lengths), 96, generator=draw, dtype=torch.float64)
    starts = (0, *itertools.accumulate(lengths))
    rest = {"heads": 1, "shared": shared, "last_only": last_only}
    with fastfpl.face("cpu"):
        whole = prefix_attention(qkv, starts=starts, **rest)
        begin, end = starts[-2:]
        rows = [*range(shared), *range(shared + begin, shared + end)]
        alone = prefix_attention(qkv[-1:, rows], starts=(0, end - begin), **rest)
    kept = whole[-1:, -1:] if last_only else whole[-1:, rows]
    torch.testing.assert_close(alone, kept, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"starts": (0,)}, InputError, "starts must rise from 0; got (0,)"),
        ({"starts": (0, 3, 3)}, InputError, "starts must rise from 0"),
        ({"shared": 4}, InputError, "must make up the 30 rows of qkv; got 4 and 30"),
        ({"heads": 7}, InputError, "qkv must hold three times heads=7 equal parts"),
        ({"bias": torch.zeros(7)}, InputError, "bias must have shape (K)"),
        ({"sos": torch.zeros(2, 40)}, KindError, "sos must be torch.float64 on cpu"),
    ],
)
def test_refuses_with_reasons(change, error, sentence):
    qkv = torch.zeros(1, 30, 120, dtype=torch.float64)
    given_ = {"qkv": qkv, "heads": 2, "shared": 0, "starts": (0, 30)} | change
    with pytest.raises(error) as caught:
        prefix_attention(**given_)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wide_heads_are_for_another_face(dtype):
    given_ = case("wide head", dtype)
    with (
        fastfpl.face("triton"),
        pytest.raises(NotSupported, match=f"128 numbers a head in {dtype}"),
    ):
        prefix_attention(**given_)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
@pytest.mark.parametrize("entry", ["prefix_attention_fwd", "prefix_attention_bwd"])
def test_too_little_memory_is_an_error_and_not_the_end(entry):
    if native.missing(entry):
        pytest.skip("fastfpl._C is not compiled")
    # what threads work in is allocated before they begin: 64 MB and more here, 8 are left
    script = f"""
import re, resource, torch
from fastfpl.ops import native
run = native.load({entry!r})
def call(rows):  # of the second thread's segment
    qkv, out = torch.zeros(1, rows + 2, 24), torch.zeros(1, 2, 8)
    starts = torch.tensor([0, 2, rows + 2])
    into = (out,) if {entry!r}.endswith("fwd") else (torch.zeros_like(qkv),)
    given = (qkv,) if {entry!r}.endswith("fwd") else (out, qkv)
    return lambda: getattr(run, {entry!r})(*given, None, None, *into, starts, 0, 1, True, 2)
small, large = call(1 << 13), call(1 << 18)
small()  # threads and their stacks are there
taken = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (8 << 20), resource.RLIM_INFINITY))
try:
    large()
except MemoryError:
    pass
else:
    raise AssertionError("it found the memory")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
small(), large()
"""
    done = subprocess.run([*warm_python(), "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
