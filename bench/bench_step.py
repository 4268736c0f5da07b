"""A whole training step of one client with cached image features, against the literal step.

Random weights of the ViT-B/16 text tower, the class names of CIFAR-100, one batch of 32 images. The
literal step encodes every prompt set at all 77 tokens as the released systems do: one for PromptFL
and pFedMoAP, FedOTP's two and its loop over all transport problems at once, FedPGP's four, of which
one is a constant and one reaches no loss. Ours is what a federation runs for a cohort of one: text
and loss of the method and the cohort's SGD. A run starts from the same values every time and gives
the loss and every gradient, each divided by its norm.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.bench_text import BEFORE, NAMES, SLOTS, WIDTH, operations, tower
from bench.bench_transport import published
from bench.clock import DEVICE, checked
from fastfpl.features import TextFeatures
from fastfpl.methods import Batch, Method, State, Task, find_method
from fastfpl.ops.faces import recorded_faces
from fastfpl.ops.lifetime import kept
from fastfpl.ops.text import encode_text
from fastfpl.ops.tower import rows_of
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import rounds as literal_rounds
from fastfpl.reference import text as literal_text
from fastfpl.reference.gate import Gate
from fastfpl.training.graphs import CudaCapture
from fastfpl.training.steps import CohortSGD

IMAGES, CLASSES, PATCHES, CLIENTS = 32, 100, 196, 10
RATE, MOMENTUM, DECAY = 0.002, 0.9, 5e-4
OPTIONS = {"fedpgp": {"reference": "x"}}  # the text that the released code encodes
# contexts that a literal step and ours send through the tower with a gradient
SETS = {"promptfl": (1, 1), "pfedmoap": (1, 1), "fedotp": (2, 2), "fedpgp": (4, 2)}
# the published transport loop stops at a change of 1e-3
LIMIT = {"fedotp": 1e-2}


@functools.cache
def classes(dtype: torch.dtype, count: int = CLASSES) -> ClassPrompts:
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    clip = SimpleNamespace(
        text=tower().to(DEVICE, dtype),
        tokenize=lambda texts: [tokenizer.encode(t) for t in texts],
    )
    plain = [" ".join(name.split()) for name in NAMES.split(",")]
    names = plain + [f"{word} {name}" for word in BEFORE for name in plain]
    return ClassPrompts(clip, names[:count])


def method_of(
    name: str, dtype: torch.dtype, clients: int = CLIENTS, count: int = CLASSES
) -> Method:
    task = Task(
        classes=classes(dtype, count),
        logit_scale=100.0,
        clients=clients,
        domains=("one",),
        client_domains=None,
        n_ctx=SLOTS,
        ctx_init=None,
        lr=RATE,
        seed=0,
        text_features=TextFeatures(),
    )
    return find_method(name)(task, OPTIONS.get(name, {}))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool(dtype: torch.dtype) -> Tensor:
    """The prompts that clients have uploaded."""
    return (0.02 * normal(1, CLIENTS, SLOTS, WIDTH)).to(DEVICE, dtype)


@functools.cache
def data(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cached features (B, D) or (B, P, D) of unit length, and labels."""
    shape = (IMAGES, PATCHES, WIDTH) if name == "fedotp" else (IMAGES, WIDTH)
    image = F.normalize(normal(2, *shape), dim=-1).to(DEVICE, dtype)
    return image, torch.arange(IMAGES, device=DEVICE) * 7 % CLASSES


def down_of(method: Method, members: int) -> State:
    """What members of a cohort download, stacked."""
    ctx = method.server_init()["ctx"]
    down = {"ctx": ctx.expand(members, *ctx.shape)}
    if method.name == "pfedmoap":
        rows = [[j for j in range(CLIENTS) if j != u] for u in range(members)]
        others = torch.tensor(rows).to(DEVICE)
        down["experts"] = pool(method.task.dtype)[others]
        down["expert_owner"], down["expert_round"] = others, torch.zeros_like(others)
    return down


def flattened(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    return torch.cat([loss.detach().view(1), *((g / g.norm()).flatten() for g in gradients)])


def ours(name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    method = method_of(name, dtype)
    image, labels = data(name, dtype)
    mask = torch.ones(1, IMAGES, dtype=torch.bool, device=DEVICE)
    index = torch.zeros(1, IMAGES, dtype=torch.int64, device=DEVICE)
    batch = Batch(image=image[None], labels=labels[None], domains=index, positions=index, mask=mask)
    with torch.no_grad():
        begin, fixed = method.start(down_of(method, 1), {}, training=True)

    def step() -> Tensor:
        trained = {k: v.clone() for k, v in begin.items()}
        sgd = CohortSGD(trained, {k: method.rate(k) for k in trained}, MOMENTUM, DECAY)
        leaves = {k: v.detach().requires_grad_() for k, v in trained.items()}
        loss = method.loss(method.text(leaves, fixed), leaves, fixed, batch)
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        found = flattened(loss, [g for k, g in zip(leaves, gradients, strict=True) if compared(k)])
        sgd.step(dict(zip(leaves, gradients, strict=True)))
        return found

    return step


def replayed(name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Our step as a CUDA graph: what a run replays from its third step of a shape on."""
    step, capture = ours(name, dtype), CudaCapture(torch.device("cuda"))
    for _ in range(2):
        capture.aside(step)
    found: list[Tensor] = []
    with kept() as read:
        replay = capture.capture(lambda: found.append(step()))

    def run() -> Tensor:
        assert read is not None  # what the graph reads lives as long as this function
        replay()
        return found[0]

    return run


def compared(name: str) -> bool:
    """Of three biases the gradient is zero, and what comes out is rounding.

    One of keys changes no softmax; one of values or of the output adds the same to all classes.
    """
    return name not in ("gate.b_k", "gate.b_v", "gate.b_o")


def literal(name: str) -> Callable[[], Tensor]:
    method = method_of(name, torch.float32)
    prompts, place = method.task.classes, method.task.classes.layout(SLOTS)
    setup = literal_rounds.Setup(
        prompts.tower, place, 100.0, RATE, MOMENTUM, DECAY, factors=[[1.0]]
    )
    image, labels = data(name, torch.float32)
    with torch.no_grad():
        begin, _ = method.start(down_of(method, 1), {}, training=True)
        experts = []
        if name == "pfedmoap":
            experts = list(encode_text(prompts.tower, place, pool(torch.float32)[1:]))

    def encode(ctx: Tensor) -> Tensor:
        return literal_text.encode_text(prompts.tower, place, ctx, False)

    def loss_of(v: dict[str, Tensor]) -> Tensor:
        if name == "fedotp":
            text = torch.stack([encode(one) for one in torch.cat((v["ctx"], v["local"]))], dim=1)
            sim = torch.einsum("bpd,cnd->bcpn", image, text).flatten(0, 1)
            with torch.no_grad():
                plan = published(sim, 0.1)
            logits = 100.0 * (plan * sim).sum((-2, -1)).view(IMAGES, CLASSES)
            return F.cross_entropy(logits, labels)
        if name == "fedpgp":
            words = prompts.words(" ".join("X" * SLOTS))
            z0, sigma, alone = encode(words), encode(v["ctx"]), encode(v["u"] @ v["v"])
            assert alone.requires_grad  # a pass that the released code makes and no loss uses
            z = encode(v["ctx"] + v["u"] @ v["v"])
            o = method.options
            pairs = torch.stack((F.cosine_similarity(z0, sigma), F.cosine_similarity(sigma, z)), 1)
            right = torch.zeros(CLASSES, dtype=torch.int64, device=DEVICE)
            contrast = F.cross_entropy(pairs / o.temperature, right)
            return F.cross_entropy(100.0 * image @ z.T, labels) + o.mu * contrast
        gate = None
        if experts:
            tensors = {n: v[f"gate.{n}"] for n in Gate.tensor_names()}
            gate = Gate(**tensors, heads=method.options.heads, scale=method.options.scaling)
        weight = method.options.local_weight if experts else 1.0
        logits = literal_rounds.logits_of(setup, v["ctx"], image, experts, gate, weight)
        return F.cross_entropy(logits, labels)

    def step() -> Tensor:
        values = {k: v[0].clone().requires_grad_() for k, v in begin.items()}
        groups = [{"params": [v], "lr": method.rate(k)} for k, v in values.items()]
        sgd = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        loss = loss_of(values)
        loss.backward()
        found = flattened(loss, [v.grad for k, v in values.items() if compared(k)])
        sgd.step()
        return found

    return step


@functools.cache
def exact(name: str) -> Tensor:
    """Our step in float64, which tests/test_<method>.py prove against the literal rounds."""
    found = ours(name, torch.float64)()
    gc.collect()
    return found


WAYS = {"literal": lambda name, _: literal(name), "ours": ours, "ours, replayed": replayed}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETS)
def bench_step(benchmark, name, way):
    if way == "ours, replayed" and DEVICE != "cuda":
        pytest.skip("steps are captured on a CUDA device alone")
    row = {"op": f"step of {name}", "B": IMAGES, "C": CLASSES, "T": SLOTS, "dtype": "float32"}
    row |= {"threads": torch.get_num_threads(), "device": DEVICE, "face": way}
    truth = exact(name)
    run = WAYS[way](name, torch.float32)
    own = classes(torch.float32).layout(SLOTS)
    sets = SETS[name][way != "literal"]
    tokens = sets * (77 * CLASSES if way == "literal" else rows_of(own, False).count + 1)
    with recorded_faces() as faces:
        checked(
            benchmark,
            run,
            truth,
            LIMIT.get(name, 1e-3) if way == "literal" else 1e-3,
            rounds=1 if way == "literal" else 9,
            flops=operations(tokens, "fwd+bwd"),
            gemm=(min(tokens, 1 << 14), WIDTH, 4 * WIDTH),
            **row,
        )
    benchmark.extra_info["tokens"] = tokens
    benchmark.extra_info["faces"] = {op: sorted(names) for op, names in faces.items()}


def literal_experts() -> Callable[[], Tensor]:
    """Encode nine other clients' prompts one by one: (1, C, 9, d)."""
    prompts, others = classes(torch.float32), pool(torch.float32)[1:]

    @torch.no_grad()
    def run() -> Tensor:
        each = [
            literal_text.encode_text(prompts.tower, prompts.layout(SLOTS), ctx, False)
            for ctx in others
        ]
        return torch.stack(each, dim=1)[None, :, :, ::4]

    return run


@pytest.mark.parametrize("way", ["literal", "ours"])
def bench_experts_of_a_client_round(benchmark, way):
    """One client's nine literal encodes; ours for all ten clients of the round at once."""
    members = CLIENTS if way == "ours" else 1
    row = {"op": "experts of pfedmoap", "C": CLASSES, "T": SLOTS, "E": 9, "dtype": "float32"}
    row |= {"threads": torch.get_num_threads(), "device": DEVICE, "face": way}

    def features(dtype: torch.dtype, count: int) -> Tensor:
        method = method_of("pfedmoap", dtype)  # with an empty cache
        return method.start(down_of(method, count), {}, training=True)[1]["experts"]

    @torch.no_grad()
    def ours() -> Tensor:
        return features(torch.float32, CLIENTS)

    with torch.no_grad():
        truth = features(torch.float64, members)
    run = ours if way == "ours" else literal_experts()
    checked(benchmark, run, truth, 1e-4, rounds=5 if way == "ours" else 1, **row)
    benchmark.extra_info["clients"] = members
