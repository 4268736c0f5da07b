"""Every face of the gate against the literal multi-head attention."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfpl.errors import InputError, KindError, NotSupported
from fastfpl.ops.faces import face
from fastfpl.ops.gate import FACES, Gate, gate_experts
from tests.truth import assert_as_good_as_eager, assert_fences_hold, fenced
from tests.warm import warm_python

COMPILED = [f.name for f in FACES["gate_experts"] if f.name in ("triton", "cpu")]
FAST = [*COMPILED, "torch"]
#: the interpreter proves Triton's kernels on the CPU; the marked rows run them on a card
PLACES = [
    *(pytest.param(name, "cpu", id=name) for name in FAST),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
]
NAMES = ("image", "experts", *Gate.tensor_names())
#: leading dimensions, B, C, E, D, heads
SIZES = {
    "one": ((), 1, 1, 1, 1, 1),
    "odd": ((), 5, 7, 3, 12, 4),
    "papers": ((), 16, 10, 10, 128, 8),
    "cohort": ((3,), 2, 5, 4, 12, 3),
    "two leading": ((2, 2), 3, 2, 4, 8, 1),
    "over a block": ((1,), 33, 17, 4, 6, 2),
    "over two vectors": ((), 49, 19, 2, 40, 2),
    "64 experts": ((), 3, 2, 64, 8, 1),
    "33 experts": ((), 4, 5, 33, 6, 1),
    "65 experts": ((), 3, 4, 65, 10, 1),
    "wide heads": ((), 3, 4, 3, 256, 2),
    "17 numbers": ((2,), 6, 5, 2, 34, 2),
    "many images": ((2,), 33, 9, 5, 64, 4),
    "many experts": ((), 8, 4, 33, 64, 2),
}


def problem(
    lead: tuple[int, ...],
    B: int,
    C: int,
    E: int,
    D: int,
    heads: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Gate]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    # scores of about one, whatever the width
    image, experts = normal(*lead, B, D), normal(*lead, C, E, D)
    one = Gate.init(D, heads, 2.0, draw, dtype=torch.float64)
    tensors = {
        name: (t + D**-0.5 * 0.3 * normal(*lead, *t.shape)).to(dtype)
        for name, t in one.tensors().items()
    }
    scale = 4 * (heads / D) ** 0.5
    return image.to(dtype), experts.to(dtype), Gate(**tensors, heads=heads, scale=scale)


def leaves_of(image: Tensor, experts: Tensor, gate: Gate) -> list[Tensor]:
    return [image, experts, *gate.tensors().values()]


def step(
    name: str, leaves: list[Tensor], gate: Gate, wanted: set[str] = frozenset(NAMES)
) -> dict[str, Tensor]:
    """Logits and the wanted gradients; leaves keep their strides."""
    mine = [x.detach().requires_grad_(n in wanted) for n, x in zip(NAMES, leaves, strict=True)]
    again = replace(gate, **dict(zip(Gate.tensor_names(), mine[2:], strict=True)))
    with face(name):
        logits = gate_experts(mine[0], mine[1], again)
    weight = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).reshape(logits.shape)
    asked = [x for x in mine if x.requires_grad]
    found = torch.autograd.grad(logits, asked, weight.to(logits)) if asked else ()
    names = [n for n, x in zip(NAMES, mine, strict=True) if x.requires_grad]
    return {"logits": logits.detach(), **dict(zip(names, found, strict=True))}


@functools.cache
def true_step(size: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What eager makes of a size in a dtype, and the truth of the same numbers."""
    image, experts, gate = problem(*SIZES[size], dtype=dtype)
    leaves = leaves_of(image, experts, gate)
    return (
        step("reference", leaves, gate),
        step("reference", [x.double() for x in leaves], gate),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_logits_and_every_gradient(name: str, device: str, size: str) -> None:
    image, experts, gate = problem(*SIZES[size])
    found = step(name, [x.to(device) for x in leaves_of(image, experts, gate)], gate)
    _, exact = true_step(size, torch.float64)
    for what, true in exact.items():
        torch.testing.assert_close(found[what].cpu(), true, rtol=1e-10, atol=1e-11, msg=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["papers", "many images", "many experts"])
@pytest.mark.parametrize(("name", "device"), PLACES)
@pytest.mark.usefixtures("_bfloat16_rounds")
def test_errs_at_most_twice_as_much_as_eager(
    name: str, device: str, size: str, dtype: torch.dtype
) -> None:
    if name == "cpu" and dtype.itemsize == 2:
        pytest.skip("the C++ face leaves 16-bit features to the torch face")
    image, experts, gate = problem(*SIZES[size], dtype=dtype)
    found = step(name, [x.to(device) for x in leaves_of(image, experts, gate)], gate)
    eager, exact = true_step(size, dtype)
    for what, true in exact.items():
        # the torch face sums the biases of values through its rounded z, in float32 alone
        if what == "logits" or (name in COMPILED and what != "b_k"):
            assert_as_good_as_eager(found[what].cpu(), eager[what], true, name=what)
    # a bias of keys changes no softmax: what eager finds is rounding
    assert name not in COMPILED or not found["b_k"].any()


def test_inputs_exercise_the_softmax() -> None:
    image, experts, gate = problem(*SIZES["papers"])
    q = torch.nn.functional.linear(image, gate.w_q, gate.b_q).unflatten(-1, (8, -1))
    k = torch.nn.functional.linear(experts, gate.w_k, gate.b_k).unflatten(-1, (8, -1))
    weights = (gate.scale * torch.einsum("bhk,cehk->cbhe", q, k)).softmax(-1)
    assert 0.25 < weights.max(dim=-1).values.mean() < 0.97


def test_reference_equals_torch_multi_head_attention() -> None:
    image, experts, gate = problem((), 4, 3, 5, 12, 3)
    # torch fixes the scale at 1/sqrt(d_k); the factor goes into the queries
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    factor = gate.scale * (12 / 3) ** 0.5
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat((gate.w_q * factor, gate.w_k, gate.w_v)))
        layer.in_proj_bias.copy_(torch.cat((gate.b_q * factor, gate.b_k, gate.b_v)))
        layer.out_proj.weight.copy_(gate.w_o)
        layer.out_proj.bias.copy_(gate.b_o)
        out, _ = layer(image.expand(3, -1, -1), experts, experts)
    want = torch.einsum("bd,cbd->bc", image, out)
    with face("reference"):
        torch.testing.assert_close(gate_experts(image, experts, gate), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_gradcheck(name: str) -> None:
    image, experts, gate = problem((2,), 2, 2, 3, 4, 2)
    leaves = [x.requires_grad_() for x in leaves_of(image, experts, gate)]

    def run(image: Tensor, experts: Tensor, *tensors: Tensor) -> Tensor:
        named = dict(zip(Gate.tensor_names(), tensors, strict=True))
        with face(name):
            return gate_experts(image, experts, replace(gate, **named))

    # the interpreter takes a minute for every direction one by one
    assert torch.autograd.gradcheck(run, leaves, fast_mode=name == "triton")


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(
    "wanted",
    [
        set(),
        {"image"},
        {"experts"},
        {"w_q"},
        {"b_q"},
        {"w_k"},
        {"b_k"},
        {"w_v"},
        {"b_v"},
        {"w_o"},
        {"b_o"},
        {"experts", *Gate.tensor_names()},
        {"image", "w_k", "w_o"},
    ],
    ids=lambda wanted: "+".join(sorted(wanted)) or "nothing",
)
def test_gradients_that_nobody_wants_are_not_computed(name: str, wanted: set[str]) -> None:
    image, experts, gate = problem(*SIZES["odd"])
    found = step(name, leaves_of(image, experts, gate), gate, wanted)
    assert set(found) == {"logits", *wanted}
    _, exact = true_step("odd", torch.float64)
    for what, tensor in found.items():
        torch.testing.assert_close(tensor, exact[what], rtol=1e-10, atol=1e-11, msg=what)


@pytest.mark.parametrize("name", COMPILED)
def test_a_gradient_of_logits_may_have_any_strides(name: str) -> None:
    image, experts, gate = problem(*SIZES["odd"])
    draw = torch.randn(7, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for by in (draw.mT, draw[:, :1].mT.expand(5, -1), draw[0, 0].expand(5, 7)):
        found = []
        for answers in (name, "reference"):
            leaves = [x.detach().requires_grad_() for x in leaves_of(image, experts, gate)]
            mine = replace(gate, **dict(zip(Gate.tensor_names(), leaves[2:], strict=True)))
            with face(answers):
                logits = gate_experts(leaves[0], leaves[1], mine)
            found.append(torch.autograd.grad(logits, leaves, by))
        for what, one, true in zip(NAMES, *found, strict=True):
            torch.testing.assert_close(one, true, rtol=1e-10, atol=1e-11, msg=what)


@pytest.mark.parametrize("name", COMPILED)
def test_a_second_derivative_is_refused(name: str) -> None:
    image, experts, gate = problem((), 2, 2, 2, 4, 2)
    with face(name):
        logits = gate_experts(image.requires_grad_(), experts, gate)
    (d_image,) = torch.autograd.grad(logits.square().sum(), image, create_graph=True)
    with pytest.raises(NotSupported, match=r"must be of first order; .* face\('torch'\) takes it"):
        d_image.sum().backward()


@pytest.mark.parametrize("name", FAST)
def test_clients_may_share_a_gate(name: str) -> None:
    image, experts, gate = problem(*SIZES["cohort"])
    common = replace(
        gate,
        **{n: t[0] if n in ("w_q", "b_q", "w_v", "b_o") else t for n, t in gate.tensors().items()},
    )
    leaves = leaves_of(image, experts, common)
    found, true = step(name, leaves, gate), step("reference", leaves, gate)
    for what in true:
        torch.testing.assert_close(found[what], true[what], rtol=1e-10, atol=1e-11, msg=what)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    ("lead", "B", "C"),
    [((2,), 0, 3), ((2,), 3, 0), ((0,), 2, 3), ((2, 0), 2, 3), ((), 0, 0)],
    ids=str,
)
def test_nothing_gives_nothing(name: str, lead: tuple[int, ...], B: int, C: int) -> None:
    image, experts, gate = problem(lead, B, C, 3, 6, 2)
    leaves = leaves_of(image, experts, gate)
    found = step(name, leaves, gate)
    assert found["logits"].shape == (*lead, B, C)
    for what, leaf in zip(NAMES, leaves, strict=True):
        assert found[what].shape == leaf.shape
        assert not found[what].any()


@pytest.mark.parametrize("name", FAST)
def test_views_read_only_their_own_elements(name: str) -> None:
    image, experts, gate = problem((), 5, 4, 3, 8, 2)
    true = step("reference", leaves_of(image, experts, gate), gate)
    wide, deep = (
        torch.full((*x.shape[:-1], 16), float("nan"), dtype=torch.float64) for x in (image, experts)
    )
    wide[..., ::2], deep[..., ::2] = image, experts
    turned = replace(
        gate, **{n: t.mT.contiguous().mT for n, t in gate.tensors().items() if t.dim() > 1}
    )
    found = step(name, leaves_of(wide[..., ::2], deep[..., ::2], turned), turned)
    for what in true:
        torch.testing.assert_close(found[what], true[what], rtol=1e-10, atol=1e-11, msg=what)
    # stride 0: clients, images, classes and experts that are one in memory
    for x, t in (
        (image[:1].expand(5, -1), experts[:1].expand(4, -1, -1)),
        (image, experts[:, :1].expand(-1, 3, -1)),
    ):
        true = step("reference", leaves_of(x.contiguous(), t.contiguous(), gate), gate)
        found = step(name, leaves_of(x, t, gate), gate)
        for what in true:
            torch.testing.assert_close(found[what], true[what], rtol=1e-10, atol=1e-11, msg=what)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("size", ["odd", "over a block", "33 experts", "17 numbers"])
def test_reads_and_writes_stay_inside(name: str, size: str) -> None:
    image, experts, gate = problem(*SIZES[size])
    walled = [fenced(x) for x in leaves_of(image, experts, gate)]
    found = step(name, walled, gate)
    _, exact = true_step(size, torch.float64)
    for what, true in exact.items():
        torch.testing.assert_close(found[what], true, rtol=1e-10, atol=1e-11, msg=what)
    for tensor in walled:
        assert_fences_hold(tensor)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", ["cohort", "over a block", "17 numbers"])
def test_kernels_stay_inside_what_they_are_given(size: str, monkeypatch) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
    from fastfpl.kernels.gate import gate_bwd, gate_fwd

    # everything the launchers allocate lies between walls as well
    made = []

    def walled(shape, dtype):
        made.append(fenced(torch.zeros(shape, dtype=dtype)).fill_(float("nan")))
        return made[-1]

    new_empty = Tensor.new_empty

    def first_empty(self, shape, *, dtype=None, **rest):
        # the interpreter's own copies are not ours
        return new_empty(self, shape, dtype=dtype, **rest) if shape == 0 else walled(shape, dtype)

    lead, B, C, E, D, heads = SIZES[size]
    clients = lead[0] if lead else 1
    draw = torch.Generator().manual_seed(3)
    qz, kv, by = (
        fenced(torch.randn(*shape, generator=draw, dtype=torch.float64))
        for shape in (
            (clients, B, 2, heads, D // heads),
            (clients, C, E, 2, heads, D // heads),
            (clients, B, C),
        )
    )
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "new_empty", first_empty)
        patched.setattr(torch, "empty_like", lambda x: walled(x.shape, x.dtype))
        logits, stats = gate_fwd(qz, kv, 1.5, True)
        d_qz, d_kv = gate_bwd(by, qz, kv, stats, 1.5, True, True)
    for tensor in (qz, kv, by, *made):
        assert_fences_hold(tensor)
    for tensor in (logits, *stats, d_qz, d_kv, *made):
        assert bool(tensor.isfinite().all())


@pytest.mark.interpreted
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16)], ids=str)
def test_blocks_of_the_kernels_do_not_matter(blocks: tuple[int, int]) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
    from fastfpl.kernels.gate import gate_bwd, gate_fwd

    draw = torch.Generator().manual_seed(4)
    qz = torch.randn(1, 37, 2, 2, 5, generator=draw, dtype=torch.float64)
    kv = torch.randn(1, 21, 3, 2, 2, 5, generator=draw, dtype=torch.float64)
    by = torch.randn(1, 37, 21, generator=draw, dtype=torch.float64)
    found = []
    for chosen in (None, blocks):
        logits, stats = gate_fwd(qz, kv, 1.5, True, chosen)
        found.append([logits, *stats, *gate_bwd(by, qz, kv, stats, 1.5, True, True, chosen)])
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", COMPILED)
def test_scores_far_apart_give_numbers(name: str) -> None:
    image, experts, gate = problem((), 4, 3, 5, 8, 2)
    far = replace(gate, scale=3e4)
    leaves = [x.float() for x in leaves_of(image, experts, far)]
    found = step(name, leaves, far)
    true = step("reference", [x.double() for x in leaves], far)
    assert all(bool(x.isfinite().all()) for x in found.values())
    torch.testing.assert_close(found["logits"].double(), true["logits"], rtol=1e-4, atol=1e-4)
    # negative: the softmax picks the smallest score
    turned = replace(gate, scale=-gate.scale)
    found, true = (step(n, leaves_of(image, experts, turned), turned) for n in (name, "reference"))
    for what in true:
        torch.testing.assert_close(found[what], true[what], rtol=1e-10, atol=1e-11, msg=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["one expert", "one-hot", "twins", "one-hot, negative scale"])
@pytest.mark.parametrize(("name", "device"), [*PLACES, pytest.param("reference", "cpu")])
def test_no_gradient_where_no_score_can_move_a_weight(
    name: str, device: str, kind: str, dtype: torch.dtype
) -> None:
    # queries and keys then have none by mathematics; large scores multiply what rounding leaves
    image, experts, gate = problem((2,), 17, 3, 1 if kind == "one expert" else 3, 64, 8)
    if kind == "twins":
        experts = experts[..., :1, :].expand(-1, -1, 2, -1)
    steep = 1e5 if "one-hot" in kind else 100.0
    gate = replace(gate, scale=-steep if "negative" in kind else steep)
    draw = torch.linspace(0.5, 1.5, image.numel(), dtype=torch.float64).reshape(image.shape)
    leaves = [x.to(dtype) for x in leaves_of(100 * image * draw, 100 * experts, gate)]
    found = step(name, [x.to(device) for x in leaves], gate)
    eager = step("reference", leaves, gate)
    exact = step("reference", [x.double() for x in leaves], gate)
    for what, true in exact.items():
        if what in ("w_q", "b_q", "w_k", "b_k"):
            assert not true.any(), what
            assert not found[what].any(), what
        elif dtype == torch.float64:
            close = {"rtol": 1e-11, "atol": 1e-11 * float(true.abs().max())}
            torch.testing.assert_close(found[what].cpu(), true, **close, msg=what)
        elif name in COMPILED:
            assert_as_good_as_eager(found[what].cpu(), eager[what], true, name=what)


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_a_scale_of_zero_takes_the_mean(name: str) -> None:
    image, experts, gate = problem(*SIZES["odd"])
    flat = replace(gate, scale=0.0)
    found = step(name, leaves_of(image, experts, flat), flat)
    same = replace(flat, w_k=torch.zeros_like(gate.w_k), scale=1.0)
    true = step("reference", leaves_of(image, experts, same), same)
    torch.testing.assert_close(found["logits"], true["logits"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found["w_v"], true["w_v"], rtol=1e-10, atol=1e-11)
    assert not found["w_q"].any()
    assert not found["w_k"].any()


@pytest.mark.parametrize("name", COMPILED)
def test_one_nan_reaches_its_logits_and_no_others(name: str) -> None:
    image, experts, gate = problem((), 4, 5, 3, 8, 2)
    experts[2, 1, 3] = float("nan")
    with face(name):
        logits = gate_experts(image, experts, gate)
    assert bool(logits[:, 2].isnan().all())
    assert int(logits.isnan().sum()) == 4


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 4),
    C=st.integers(0, 5),
    E=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_laws(name: str, B: int, C: int, E: int, heads: int, seed: int) -> None:
    image, experts, gate = problem((2,), B, C, E, 6, heads, seed)
    close = {"rtol": 0, "atol": 1e-12}
    with face(name):
        logits = gate_experts(image, experts, gate)
        assert logits.shape == (2, B, C)
        turned = gate_experts(image, experts.flip(-2), gate)
        torch.testing.assert_close(turned, logits, **close)
        turned = gate_experts(image, experts.flip(-3), gate)
        torch.testing.assert_close(turned, logits.flip(-1), **close)
        twice = gate_experts(image, torch.cat((experts, experts), dim=-2), gate)
        torch.testing.assert_close(twice, logits, **close)
        one = replace(gate, **{name: t[1] for name, t in gate.tensors().items()})
        torch.testing.assert_close(gate_experts(image[1], experts[1], one), logits[1], **close)
        part = gate_experts(image[:, : B // 2], experts, gate)
        torch.testing.assert_close(part, logits[:, : B // 2], **close)
        shifted = replace(gate, b_k=gate.b_k + 3)
        torch.testing.assert_close(gate_experts(image, experts, shifted), logits, **close)


def test_the_number_of_threads_changes_no_bit() -> None:
    if "cpu" not in COMPILED:
        pytest.skip("fastfpl._C is not compiled")
    image, experts, gate = problem((2,), 33, 40, 10, 128, 8, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            # the products with weights stay on one thread: they are torch's
            torch.set_num_threads(1)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(torch, "get_num_threads", lambda count=threads: count)
                found.append(step("cpu", leaves_of(image, experts, gate), gate))
    finally:
        torch.set_num_threads(before)
    for what, tensor in found[0].items():
        assert torch.equal(tensor, found[1][what]), what


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_autocast_changes_no_number(name: str) -> None:
    image, experts, gate = problem(*SIZES["odd"], dtype=torch.float32)
    leaves = leaves_of(image, experts, gate)
    found = []
    for enabled in (False, True):
        mine = [x.detach().requires_grad_() for x in leaves]
        own = replace(gate, **dict(zip(Gate.tensor_names(), mine[2:], strict=True)))
        with face(name), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = gate_experts(mine[0], mine[1], own)
        found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), mine)])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(cast, plain)


def test_init_is_that_of_linear_layers() -> None:
    gate = Gate.init(64, 8, 10.0, torch.Generator().manual_seed(0))
    for name, tensor in gate.tensors().items():
        assert tensor.shape == ((64, 64) if name.startswith("w_") else (64,))
        assert tensor.abs().max() <= 1 / 8
        assert tensor.abs().max() > 0.1
        assert tensor.dtype == torch.float32
    again = Gate.init(64, 8, 10.0, torch.Generator().manual_seed(0))
    assert torch.equal(gate.w_q, again.w_q)
    assert not torch.equal(gate.w_q, gate.w_k)


def test_faces_refuse_with_reasons() -> None:
    image, experts, gate = problem((), 2, 2, 2, 4, 2)
    low = replace(gate, **{n: t.bfloat16() for n, t in gate.tensors().items()})
    if "cpu" in COMPILED:
        with (
            face("cpu"),
            pytest.raises(NotSupported, match=r"cpu: image is torch.bfloat16, not float32"),
        ):
            gate_experts(image.bfloat16(), experts.bfloat16(), low)
    image, experts, gate = problem((), 1, 1, 1, 129, 1)
    with (
        face("triton"),
        pytest.raises(NotSupported, match="triton: heads have 129 numbers, at most 128"),
    ):
        gate_experts(image, experts, gate)


def test_bad_input_gets_a_sentence() -> None:
    image, experts, gate = problem((2,), 3, 4, 5, 6, 2)
    for arguments, kind, text in (
        ((image[..., :5], experts, gate), InputError, r"experts must have shape .* with B=3, D=5"),
        ((image[0], experts, gate), InputError, r"w_q must have leading dimensions \(\) or none"),
        ((image, experts[..., :0, :], gate), InputError, "at least one expert; got E=0"),
        ((image, experts, replace(gate, heads=4)), InputError, "heads must divide D; got 4"),
        ((image, experts.float(), gate), KindError, "experts must be torch.float64 as image is"),
        ((image.float(), experts.float(), gate), KindError, "w_q must be torch.float32 as image"),
        (
            (image, experts[:1].expand(3, -1, -1, -1), gate),
            InputError,
            r"experts must have the leading dimensions \(2,\) of image; got \(3,\)",
        ),
        (
            (image, experts, replace(gate, b_o=gate.b_o[..., :3])),
            InputError,
            r"b_o must have shape \(\.\.\., D\); got \(2, 3\) with D=6",
        ),
    ):
        with pytest.raises(kind, match=text):
            gate_experts(*arguments)


TF32 = {
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "fp32_precision of all": "torch.backends.fp32_precision = 'tf32'",
}


def test_every_way_of_allowing_tf32_is_seen() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
    # in processes of their own: torch cannot take back that one of its switches was used
    look = """
import torch
from fastfpl.kernels.precision import allows_tf32
from fastfpl.kernels import attention, gate
def seen():
    qkv, qz = torch.empty(1, 4, 96, device="meta"), torch.empty(1, 4, 2, 2, 16, device="meta")
    kv = torch.empty(1, 3, 2, 2, 2, 16, device="meta")
    of_gate = gate._constants(qz, kv, None)["PRECISION"]
    of_attention = attention._settings(qkv, 2, False, None)["PRECISION"]
    return allows_tf32(), of_gate, of_attention
"""
    script = look + "assert seen() == (False, 'ieee', 'bf16x6'), seen()\n"
    script += "import os, sys\n"
    # a fork each, so that torch is imported once
    for how, line in TF32.items():
        script += f"""
if not os.fork():
    {line}
    os._exit(0 if seen() == (True, 'tf32', 'tf32') else print({how!r}, seen()) or 1)
assert os.wait()[1] == 0, {how!r}
"""
    done = subprocess.run([*warm_python(), "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def launches() -> None:
    """What the kernels are launched with at the papers' sizes, in every dtype."""
    from fastfpl.kernels.gate import gate_bwd, gate_fwd

    def step(dtype: torch.dtype, U: int, B: int, C: int, E: int, H: int, d: int) -> None:
        qz = torch.empty(U, B, 2, H, d, device="meta", dtype=dtype)
        kv = torch.empty(U, C, E, 2, H, d, device="meta", dtype=dtype)
        logits, stats = gate_fwd(qz, kv, 10.0, True)
        gate_bwd(logits.to(dtype), qz, kv, stats, 10.0, True, True)

    for dtype in (torch.float32, torch.bfloat16):
        step(dtype, 1, 32, 100, 10, 8, 16)
        step(dtype, 1, 128, 1000, 10, 8, 128)
    step(torch.float16, 1, 32, 100, 10, 8, 16)
    step(torch.float64, 1, 32, 100, 10, 8, 16)
    gate_fwd(
        torch.empty(16, 128, 2, 8, 16, device="meta"),
        torch.empty(16, 1000, 30, 2, 8, 16, device="meta"),
        10.0,
        False,
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        step(torch.float32, 1, 32, 100, 10, 8, 16)
        step(torch.float32, 1, 128, 1000, 10, 8, 128)
    finally:
        torch.set_float32_matmul_precision(before)


#: What the face takes beyond the papers' sizes: widths of a head up to the most, one of them odd;
#: any number of experts, of which one and two are loops that the compiler unrolls.
LIMITS = {
    "d": (20, 64, 128),
    "kind": ("float16", "bfloat16", "tf32", "float32", "float64"),
    "E": (1, 2, 33),
    "B, C": ((1, 1), (128, 1000)),
    "U": (1, 10),
}


def limits_launches() -> None:
    """Launch any two of the face's limits together, forward and back."""
    from fastfpl.kernels.gate import gate_bwd, gate_fwd
    from tests.aot import every_pair

    before = torch.get_float32_matmul_precision()
    for row in every_pair(**LIMITS):
        dtype = getattr(torch, row["kind"].replace("tf32", "float32"))
        U, (B, C), E, d = (row[name] for name in ("U", "B, C", "E", "d"))
        qz = torch.empty(U, B, 2, 8, d, device="meta", dtype=dtype)
        kv = torch.empty(U, C, E, 2, 8, d, device="meta", dtype=dtype)
        torch.set_float32_matmul_precision("high" if row["kind"] == "tf32" else "highest")
        try:
            logits, stats = gate_fwd(qz, kv, 10.0, True)
            gate_bwd(logits.to(dtype), qz, kv, stats, 10.0, True, True)
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_fit_at_the_limits_of_the_face() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
    from tests.aot import assert_fits

    assert_fits(limits_launches)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_fit_every_card() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
    from tests.aot import assert_fits

    assert_fits(launches)
