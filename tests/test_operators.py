"""Ops inside torch.compile and torch.func: the numbers of a plain call, or a sentence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastfpl.errors import InputError, NotSupported
from fastfpl.handles import held
from fastfpl.ops import (
    Gate,
    encode_embedded,
    encode_text,
    gate_experts,
    prefix_attention,
    sinkhorn,
    transport_logits,
    transport_plan,
)
from fastfpl.ops.faces import face, recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.prompts import ClassPrompts
from fastfpl.reference.text import PromptLayout, TextTower
from tests.test_gate import problem
from tests.test_text import WordsClip, random_tower

pytestmark = [
    # of torch's own checks, which look whether every output has a gradient
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

TOWER = random_tower(depth=2, length=16)
LAYOUT = ClassPrompts(WordsClip(TOWER), ("cat", "owl")).layout(2)  # type: ignore[arg-type]
GATE = problem((), 3, 4, 2, 12, 3)
EOT = torch.tensor([7, 3, 12])
STRICT = {"eps": 0.2, "tol": 1e-12}


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """An op as a function of tensors; the first ``moved`` of them are differentiated."""

    run: Callable[..., Tensor]
    given: tuple[Tensor, ...]
    moved: int
    op: str = ""


def gated(image: Tensor, experts: Tensor, *tensors: Tensor) -> Tensor:
    return gate_experts(image, experts, Gate(*tensors, heads=GATE[2].heads, scale=GATE[2].scale))


def gated_short(image: Tensor, experts: Tensor, w_q: Tensor, b_v: Tensor) -> Tensor:
    own = GATE[2]
    others = (own.b_q, own.w_k, own.b_k, own.w_v, b_v, own.w_o, own.b_o)
    return gate_experts(image, experts, Gate(w_q, *others, heads=own.heads, scale=own.scale))


def attended(qkv: Tensor, bias: Tensor, sos: Tensor) -> Tensor:
    return prefix_attention(qkv, heads=2, shared=4, starts=(0, 3, 8), bias=bias, sos=sos)


def attended_last(qkv: Tensor) -> Tensor:
    return prefix_attention(qkv, heads=2, shared=4, starts=(0, 3, 8), last_only=True)


def embedded(prompts: Tensor, deep: Tensor) -> Tensor:
    return encode_embedded(TOWER, prompts, EOT, shared=2, deep=deep)


def planned(a: Tensor, b: Tensor, M: Tensor) -> Tensor:
    return sinkhorn(a, b, M, 0.3, stopThr=1e-12)


def entropic(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return planned(a, b, M)


WEIGHTS = [(x.abs() + 0.2) for x in (drawn(5, seed=4), drawn(2, 3, seed=5))]
CASES = {
    "gate": Case(gated, (*GATE[:2], *GATE[2].tensors().values()), 10, "gate_experts"),
    "gate, cohort": Case(
        gated_short,
        (drawn(2, 3, 12), drawn(2, 4, 2, 12, seed=5), drawn(2, 12, 12, seed=6), GATE[2].b_v),
        4,
        "gate_experts",
    ),
    "attention": Case(attended, (drawn(2, 12, 96), drawn(96), drawn(2, 32)), 1, "prefix_attention"),
    "attention, last": Case(attended_last, (drawn(12, 96),), 1, "prefix_attention"),
    "text": Case(lambda ctx: encode_text(TOWER, LAYOUT, ctx), (drawn(2, 24),), 1, "encode_text"),
    "text, deep": Case(
        lambda ctx, deep: encode_text(TOWER, LAYOUT, ctx, deep=deep),
        (drawn(2, 2, 24), drawn(1, 2, 24)),
        2,
        "encode_text",
    ),
    "text, own": Case(
        lambda ctx: encode_text(TOWER, LAYOUT, ctx, class_specific=True),
        (drawn(2, 2, 24),),
        1,
        "encode_text",
    ),
    "embedded": Case(embedded, (drawn(3, 16, 24), drawn(1, 2, 24)), 2, "encode_embedded"),
    "logits": Case(
        lambda patches, prompts: transport_logits(patches, prompts, **STRICT),
        (drawn(2, 5, 8) / 3, drawn(3, 2, 8, seed=5) / 3),
        2,
        "transport_logits",
    ),
    "logits, plan": Case(
        lambda patches, prompts: transport_logits(patches, prompts, plan_gradient=True, **STRICT),
        (drawn(2, 5, 8) / 3, drawn(3, 2, 8, seed=5) / 3),
        2,
        "transport_logits",
    ),
    "plan": Case(
        lambda sim: transport_plan(sim, mass=0.8, plan_gradient=True, **STRICT),
        (drawn(5, 2) / 5,),
        1,
        "transport_plan",
    ),
    "sinkhorn": Case(
        entropic,
        (
            drawn(2, 5, 3) / 3,
            WEIGHTS[0] / WEIGHTS[0].sum(),
            WEIGHTS[1] / WEIGHTS[1].sum(-1)[:, None],
        ),
        3,
        "sinkhorn",
    ),
}
#: A face whose gradient is written by hand, and the one that plain torch differentiates.
FACES = {"encode_embedded": ("torch",), "sinkhorn": ("cpu",), "transport_plan": ("cpu",)}
ROWS = [(c, f) for c in CASES for f in FACES.get(CASES[c].op, ("cpu", "torch"))]
NEAR = {"rtol": 1e-8, "atol": 1e-10}
every_case = pytest.mark.parametrize(("case", "name"), ROWS)
#: Rows of faces that are a step which no transform looks into.
OPAQUE = [(c, f) for c, f in ROWS if f == "cpu" or CASES[c].op == "transport_logits"]
opaque_case = pytest.mark.parametrize(("case", "name"), [*OPAQUE, ("embedded", "torch")])


def stretched(given: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Other tensors of the same kind: three of each."""
    factors = 1 + 0.1 * torch.arange(3).double()
    return [torch.stack([x * float(f) for f in factors]) for x in given]


def values(case: Case, *given: Tensor) -> Tensor:
    result = case.run(*given)
    weight = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view(result.shape)
    return (result.sin() * weight).sum()


def plain_gradients(case: Case, given: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(i < case.moved) for i, x in enumerate(given)]
    return torch.autograd.grad(values(case, *leaves), leaves[: case.moved])


def close(mine: Any, others: Any) -> None:
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, **NEAR)


# --- torch.func -----------------------------------------------------------------------------------


@opaque_case
def test_transforms_equal_a_loop(case: str, name: str) -> None:
    one = CASES[case]
    moved = tuple(range(one.moved))
    batch = stretched(one.given, 0)
    if one.op == "sinkhorn":  # totals must agree
        batch[1:] = [x / x.sum(-1, keepdim=True) for x in batch[1:]]
    rows = list(zip(*batch, strict=True))
    grad = torch.func.grad(lambda *given: values(one, *given), argnums=moved)
    with face(name, one.op), recorded_faces() as seen:
        looped = torch.stack([one.run(*row) for row in rows])
        torch.testing.assert_close(torch.func.vmap(one.run)(*batch), looped, **NEAR)
        # one argument alone, along its last dimension
        for at in moved:
            dims = tuple(-1 if i == at else None for i in range(len(one.given)))
            given = [batch[i] if i == at else x for i, x in enumerate(one.given)]
            looped = torch.stack(
                [one.run(*(x[j] if i == at else x for i, x in enumerate(given))) for j in range(3)]
            )
            given[at] = given[at].movedim(0, -1)
            torch.testing.assert_close(torch.func.vmap(one.run, dims)(*given), looped, **NEAR)
        close(grad(*one.given), plain_gradients(one, list(one.given)))
        each = [plain_gradients(one, list(row)) for row in rows]
        stacked = [torch.stack(list(column)) for column in zip(*each, strict=True)]
        close(torch.func.vmap(grad)(*batch), stacked)
        # the same, the other way round: gradients of a batch of calls
        outer = torch.func.grad(
            lambda *given: torch.func.vmap(lambda *row: values(one, *row))(*given).sum(), moved
        )
        close(outer(*batch), stacked)
        # a gradient of each row in what all of them share
        shared = torch.func.vmap(grad, (0, *(None,) * (len(batch) - 1)))(batch[0], *one.given[1:])
        each = [plain_gradients(one, [row, *one.given[1:]]) for row in batch[0]]
        close(shared, [torch.stack(list(column)) for column in zip(*each, strict=True)])
    assert seen == {one.op: {name}}


@opaque_case
def test_jacobians_equal_autograds(case: str, name: str) -> None:
    one = CASES[case]
    moved = tuple(range(one.moved))

    def some(*given: Tensor) -> Tensor:
        result = one.run(*given).flatten()
        return result[:: -(-len(result) // 5)]

    with face(name, one.op):
        mine = torch.func.jacrev(some, moved)(*one.given)
        result = some(*(leaves := [x.clone().requires_grad_() for x in one.given]))
        rows = [torch.autograd.grad(y, leaves[: one.moved], retain_graph=True) for y in result]
    for column, jacobian in zip(zip(*rows, strict=True), mine, strict=True):
        exact = torch.stack(column).view(jacobian.shape)
        torch.testing.assert_close(jacobian, exact, **NEAR)


# where the plan is a constant, what the gradient does is no second derivative
@pytest.mark.parametrize("case", [case for case in CASES if case != "logits"])
def test_without_a_choice_derivatives_of_gradients_are_right(case: str) -> None:
    one = CASES[case]
    first, rest = one.given[0], one.given[1:]
    step = drawn(*first.shape, seed=9)

    def along(move: float) -> Tensor:
        return plain_gradients(one, [first + move * step, *rest])[0]

    exact = (along(1e-5) - along(-1e-5)) / 2e-5
    inner = torch.func.grad(lambda x: values(one, x, *rest))
    near = {"rtol": 1e-4, "atol": 1e-6 * max(1, float(exact.abs().max()))}
    found = torch.func.grad(lambda x: (inner(x) * step).sum())(first)
    torch.testing.assert_close(found, exact, **near)
    torch.testing.assert_close(torch.func.jvp(inner, (first,), (step,))[1], exact, **near)
    leaf = first.clone().requires_grad_()  # an outer pass of autograd's own
    (found,) = torch.autograd.grad((inner(leaf) * step).sum(), leaf)
    torch.testing.assert_close(found, exact, **near)


@pytest.mark.parametrize("info", [False, True])
def test_a_batch_of_transport_says_how_it_ended(info: bool) -> None:
    patches, prompts = stretched(CASES["logits"].given, 0)

    def run(x: Tensor, t: Tensor) -> Any:
        return transport_logits(x, t, tol=1e-13, max_iter=1, info=info)

    if not info:
        with pytest.raises(RuntimeError, match="18 of 18 problems ended above tol=1e-13"):
            torch.func.vmap(run)(patches, prompts)
        return
    found, plain = torch.func.vmap(run)(patches, prompts), run(patches, prompts)
    close((found[0], *found[1]), (plain[0], *plain[1]))


def test_a_batch_of_weights_is_checked() -> None:
    M, a, b = CASES["sinkhorn"].given
    bad = torch.stack([a, -a])
    with pytest.raises(
        InputError, match=r"a must be finite and at least 0; got -.* at \(1, 0, 0\)"
    ):
        torch.func.vmap(lambda a: planned(a, b, M))(bad)
    plan, ended = torch.func.vmap(lambda M: sinkhorn(None, None, M, 0.3, log=True))(M)
    want, told = sinkhorn(None, None, M, 0.3, log=True)
    close((plan, ended["niter"], ended["err"]), (want, told["niter"], told["err"]))


# --- second order ---------------------------------------------------------------------------------


def of_gradient(case: Case, *given: Tensor) -> Tensor:
    """The first gradient, with a graph, by plain autograd."""
    result = case.run(*given)
    (gradient,) = torch.autograd.grad(result.sum(), given[0], create_graph=True)
    return gradient


@every_case
def test_second_derivatives_are_right_or_refused(case: str, name: str) -> None:
    one = CASES[case]
    exact = one.op in ("transport_plan", "sinkhorn")
    leaves = [x.clone().requires_grad_(i < one.moved) for i, x in enumerate(one.given)]
    plain = name == "torch" and one.op != "transport_logits"
    with face(name, one.op), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if exact or plain:
            mine = one.run(*leaves)
            assert torch.autograd.gradgradcheck(
                lambda *moved: one.run(*moved, *leaves[one.moved :]),
                leaves[: one.moved],
                fast_mode=True,
            ), mine.shape
            return
        gradient = of_gradient(one, *leaves)
        # also where the loss does not say so: here d_result is a constant
        for at in range(one.moved):
            with pytest.raises(NotSupported, match=f"{one.op}: derivatives must be of first order"):
                torch.autograd.grad(gradient.sum(), leaves[at], retain_graph=True)


def test_a_refused_derivative_names_what_takes_it() -> None:
    for case, cure in (
        ("gate", r"face\('torch'\) takes it"),
        ("attention", "torch.func.hessian takes it"),
        ("text", "torch.func.hessian takes it"),
        ("logits", r"face\('reference'\) takes it"),
    ):
        leaves = [x.clone().requires_grad_() for x in CASES[case].given]
        with face("cpu"):
            gradient = of_gradient(CASES[case], *leaves)
        with pytest.raises(NotSupported, match=cure):
            torch.autograd.grad(gradient.sum(), leaves[0])


# --- torch.compile --------------------------------------------------------------------------------


def compiled(run: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(run, backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("case", "name"), [*OPAQUE, *((c, "torch") for c in ("gate", "attention", "text", "embedded"))]
)
def test_a_compiled_call_equals_a_plain_one(case: str, name: str) -> None:
    one = CASES[case]
    found = []
    with face(name, one.op), recorded_faces() as seen:
        for wrap in (lambda f: f, compiled):
            leaves = [x.clone().requires_grad_(i < one.moved) for i, x in enumerate(one.given)]
            value = wrap(lambda *given: values(one, *given))(*leaves)
            found.append([value.detach(), *torch.autograd.grad(value, leaves[: one.moved])])
    assert seen == {one.op: {name}}
    close(*found)


@pytest.mark.parametrize("case", CASES)
def test_compiled_shapes_may_change(case: str) -> None:
    one = CASES[case]
    run = compiled(torch.func.vmap(one.run))
    batch = stretched(one.given, 0)
    if one.op == "sinkhorn":
        batch[1:] = [x / x.sum(-1, keepdim=True) for x in batch[1:]]
    for count in (3, 2):
        some = [x[:count] for x in batch]
        looped = torch.stack([one.run(*row) for row in zip(*some, strict=True)])
        torch.testing.assert_close(run(*some), looped, **NEAR)


def test_another_tower_and_layout_are_another_graph() -> None:
    towers = [TOWER, random_tower(depth=1, seed=5)]
    run = compiled(lambda tower, layout, ctx: encode_text(tower, layout, ctx))
    for tower in (*towers, TOWER):
        layout = ClassPrompts(WordsClip(tower), ("cat", "dog")).layout(2)  # type: ignore[arg-type]
        ctx = drawn(2, 24)
        torch.testing.assert_close(run(tower, layout, ctx), encode_text(tower, layout, ctx))


def test_what_stands_around_a_compiled_call_counts() -> None:
    ctx = drawn(2, 2, 24)
    run = compiled(lambda ctx: encode_text(TOWER, LAYOUT, ctx))
    with recorded_faces() as seen:
        run(ctx)
        with face("torch", "encode_text"):
            run(ctx)
    assert seen == {"encode_text": {"cpu", "torch"}}
    with (
        memory_limit(100),
        pytest.raises(Exception, match=r"max_memory must be at least \d+ bytes for one class"),
    ):
        run(ctx)
    torch.testing.assert_close(run(ctx), encode_text(TOWER, LAYOUT, ctx))


@pytest.mark.parametrize("op", ["gate_experts", "prefix_attention", "encode_text", "embedded"])
def test_autocast_means_the_same_compiled(op: str) -> None:
    narrow = random_tower(depth=1, dtype=torch.float32)
    layout = ClassPrompts(WordsClip(narrow), ("cat", "owl")).layout(2)  # type: ignore[arg-type]
    gate = replace(GATE[2], **{n: x.float() for n, x in GATE[2].tensors().items()})
    runs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "gate_experts": (lambda x: gate_experts(x, GATE[1].float(), gate), GATE[0]),
        "prefix_attention": (attended_last, drawn(2, 12, 96)),
        "encode_text": (lambda x: encode_text(narrow, layout, x), drawn(2, 24)),
        "embedded": (lambda x: encode_embedded(narrow, x, EOT), drawn(3, 16, 24)),
    }
    run, given = runs[op]

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    found = []
    for wrap in (lambda f: f, compiled):
        leaf = given.float().requires_grad_()
        result = wrap(cast)(leaf)
        found.append((result.detach(), *torch.autograd.grad(result.float().sum(), leaf)))
    for mine, plain in zip(*found, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7)


def test_forward_mode_is_not_taken_for_nothing_in_a_graph() -> None:
    image, rest = GATE[0], CASES["gate"].given[1:]

    def along(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: gated(x, *rest), (x,), (x,))[1]

    with pytest.raises(Exception, match=r"forward.mode"):
        compiled(along)(image)


# --- operators as torch checks them ---------------------------------------------------------------


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments as its op gives them."""
    library = torch.ops.fastfpl

    def leaves(case: str) -> list[Tensor]:
        moved = CASES[case].moved
        return [x.clone().requires_grad_(i < moved) for i, x in enumerate(CASES[case].given)]

    text = (TOWER.handle, LAYOUT.handle, False, torch.float64, 0, "")
    statics = {
        "gate": ("gate_experts", (GATE[2].heads, GATE[2].scale, "")),
        "attention": ("prefix_attention", (2, 4, [0, 3, 8], True, False, "")),
        "text, deep": ("encode_text", text),
        "logits": (
            "transport_logits",
            (0.2, 0.8, False, 1000, 1e-10, False, True, ""),
        ),
        "sinkhorn": ("sinkhorn", (True, True, 0.3, 1000, -1.0, False, True, "")),
    }
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for case, (op, rest) in statics.items():
        tensors = leaves(case)
        found[op] = getattr(library, op), (tensors, *rest)
        with torch.no_grad():
            by = getattr(library, op)(tensors, *rest)[0].cos()
        needs = [x.requires_grad for x in tensors]
        plain = [x.detach() for x in tensors]
        found[f"{op}_backward"] = (
            getattr(library, f"{op}_backward"),
            (by, plain, needs, False, *rest),
        )
    prompts, deep = leaves("embedded")
    rest = (TOWER.handle, 2, 1, torch.float64, 0, "")
    found["encode_embedded"] = library.encode_embedded, ([prompts, EOT, deep], *rest)
    by = drawn(3, 24)
    plain = [prompts.detach(), EOT, deep.detach()]
    found["encode_embedded_backward"] = (
        library.encode_embedded_backward,
        (by, plain, [True, False, True], False, *rest),
    )
    plan = (drawn(5, 2).requires_grad_(), 0.2, 0.8, False, 1000, 1e-10, False)
    found["transport_plan"] = library.transport_plan, plan
    return found


NAMES = sorted({c.op for c in CASES.values()})
NAMES += [f"{op}_backward" for op in NAMES if op != "transport_plan"]


def test_no_operator_is_left_out() -> None:
    schemas = torch._C._jit_get_all_schemas()
    named = {x.name.removeprefix("fastfpl::") for x in schemas if x.name.startswith("fastfpl::")}
    assert named == set(NAMES) == set(operators())


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_checks(name: str) -> None:
    operator, arguments = operators()[name]
    opcheck(operator, arguments)


# --- handles --------------------------------------------------------------------------------------


def test_a_copy_has_a_handle_of_its_own() -> None:
    tower = random_tower(depth=1)
    copies = [
        copy.copy(tower),
        copy.deepcopy(tower),
        pickle.loads(pickle.dumps(tower)),
        replace(tower, eps=1e-3),
    ]
    handles = {x.handle for x in (tower, *copies)}
    assert len(handles) == 5
    for one in (tower, *copies):
        assert held(one.handle, TextTower) is one
    assert copies[3].eps == 1e-3


def test_an_object_that_is_gone_is_missed() -> None:
    tower = random_tower(depth=1)
    handle = tower.handle
    with pytest.raises(InputError, match="handle must be of a PromptLayout that lives; got 'TextT"):
        held(handle, PromptLayout)
    del tower
    with pytest.raises(InputError, match="handle must be of a TextTower that lives; got 'TextTow"):
        held(handle, TextTower)
