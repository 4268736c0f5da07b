"""The text pass: every face against the literal tower and the strongest plain forms of it.

Random weights of the ViT-B text tower (12 layers of width 512). Class names are CIFAR-100's, with a
word before them where a list is longer; that gives about the papers' tokens a class. Rows run along
the axes through C=100, T=16, one context; ``--all-sizes`` runs the whole grid. What would take more
than a minute a call, by its operations and this machine's GEMM rate, is skipped and says so.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.clock import DEVICE, checked, elsewhere, gemm_rate
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.text import FACES, encode_text
from fastfpl.ops.tower import rows_of
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import text as reference
from fastfpl.reference.text import Block, PromptLayout, TextTower

NAMES = """apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy,
bridge, bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl,
hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man,
maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree, pear,
pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket,
rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar,
sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train, trout, tulip,
turtle, wardrobe, whale, willow tree, wolf, woman, worm"""
SLOTS, WIDTH, LAYERS = 16, 512, 12
BEFORE = ["small", "big", "old", "young", "red", "blue", "green", "wooden", "painted", "broken"]


@functools.cache
def tower() -> TextTower:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=draw)

    # the scales with which CLIP's towers are initialised
    narrow, wide = WIDTH**-0.5, (2 * WIDTH) ** -0.5
    out = narrow * (2 * LAYERS) ** -0.5
    one, zero = torch.ones(WIDTH), torch.zeros(WIDTH)
    blocks = tuple(
        Block(
            ln_1_w=one,
            ln_1_b=zero,
            qkv_w=normal(3 * WIDTH, WIDTH, std=narrow),
            qkv_b=normal(3 * WIDTH, std=0.01),
            out_w=normal(WIDTH, WIDTH, std=out),
            out_b=normal(WIDTH, std=0.01),
            ln_2_w=one,
            ln_2_b=zero,
            fc_w=normal(4 * WIDTH, WIDTH, std=wide),
            fc_b=normal(4 * WIDTH, std=0.01),
            proj_w=normal(WIDTH, 4 * WIDTH, std=out),
            proj_b=normal(WIDTH, std=0.01),
        )
        for _ in range(LAYERS)
    )
    return TextTower(
        token_embedding=normal(49408, WIDTH, std=0.02),
        positional=normal(77, WIDTH, std=0.01),
        blocks=blocks,
        ln_w=one,
        ln_b=zero,
        projection=normal(WIDTH, 512, std=narrow),
        projection_b=None,
        heads=8,
        activation="quick_gelu",
        eps=1e-5,
        sos=49406,
        eot=49407,
    )


@functools.cache
def layout(classes: int = 100, slots: int = SLOTS, device: str = DEVICE) -> PromptLayout:
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    clip = SimpleNamespace(
        text=tower().to(device, torch.float32),
        tokenize=lambda texts: [tokenizer.encode(t) for t in texts],
    )
    plain = [" ".join(name.split()) for name in NAMES.split(",")]
    names = plain + [f"{word} {name}" for word in BEFORE for name in plain]
    return ClassPrompts(clip, names[:classes]).layout(slots)


def contexts(count: int, slots: int = SLOTS) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return (0.02 * torch.randn(count, slots, WIDTH, generator=draw)).to(DEVICE)


def step(encode: Callable[[Tensor], Tensor], ctx: Tensor) -> Tensor:
    """Features and the gradient of the context, scaled so that one limit judges both."""
    leaf = ctx.clone().requires_grad_()
    features = encode(leaf)
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(features.shape, generator=draw).to(features)
    (gradient,) = torch.autograd.grad((features * weight).sum(), leaf)
    return torch.cat([(x / x.norm()).flatten() for x in (features.detach(), gradient)])


@torch.no_grad()
def forward(encode: Callable[[Tensor], Tensor], ctx: Tensor) -> Tensor:
    return encode(ctx)


def packed(ctx: Tensor) -> Tensor:
    """Encode CIFAR-100 by the face that answers here."""
    return encode_text(tower().to(DEVICE, torch.float32), layout(), ctx)


class Way:
    """One way to encode, over one list of classes."""

    def __init__(
        self, name: str, classes: int, slots: int, dtype: torch.dtype, own: bool = False
    ) -> None:
        self.tower = tower().to(DEVICE, dtype)
        self.layout = layout(classes, slots)
        self.length = int(self.layout.eot.max()) + 1
        self.name = name
        self.own = own  # every class has a context of its own

    def tokens(self) -> int:
        """Tokens of one context; the packed ways count SOS and leave out what fills up."""
        if self.name in CUT:
            return self.length * len(self.layout.eot)
        if self.name == "literal":
            return 77 * len(self.layout.eot)
        return rows_of(self.layout, self.own).count + 1

    def __call__(self, ctx: Tensor) -> Tensor:
        if self.name in ("cut", "literal"):
            return reference.encode_text(*self._cut(), ctx, self.own)
        if self.name == "cut+compile":
            return compiled(self.layout, self.tower.dtype, self.own)(ctx)
        if self.name == "flex":
            return flexed(self.tower, self.layout, ctx)
        with fastfpl.face(self.name):
            return encode_text(self.tower, self.layout, ctx, class_specific=self.own)

    def _cut(self) -> tuple[TextTower, PromptLayout]:
        return (self.tower, self.layout) if self.name == "literal" else cut(self.tower, self.layout)


CUT = ("cut", "cut+compile")


def cut(whole: TextTower, places: PromptLayout) -> tuple[TextTower, PromptLayout]:
    """Drop what follows the longest prompt's EOT: what a careful user of the loop does."""
    length = int(places.eot.max()) + 1
    shorter = replace(whole, positional=whole.positional[:length])
    return shorter, replace(places, tokens=places.tokens[:, :length])


@functools.cache
def compiled(
    places: PromptLayout, dtype: torch.dtype, own: bool = False
) -> Callable[[Tensor], Tensor]:
    shorter, shorter_places = cut(tower().to(DEVICE, dtype), places)
    return torch.compile(lambda ctx: reference.encode_text(shorter, shorter_places, ctx, own))


@functools.cache
def _flex_mask(places: PromptLayout, device: str):
    """Rows of the prefix, SOS first, and of every class behind it, for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = rows_of(places, False)
    lead = rows.shared + 1
    lengths = torch.tensor(rows.starts).diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    owner = torch.cat((torch.full((lead,), -1), owner)).to(device)

    def allowed(_b, _h, q, k):
        return (k <= q) & ((owner[k] == -1) | (owner[k] == owner[q]))

    count = len(owner)
    return create_block_mask(allowed, None, None, count, count, device=device), rows, lead


@functools.cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flexed(whole: TextTower, places: PromptLayout, ctx: Tensor) -> Tensor:
    """Pack the rows as the library does, with torch's FlexAttention between the products."""
    mask, rows, lead = _flex_mask(places, str(ctx.device))
    groups, device = len(ctx), ctx.device
    sos = whole.token_embedding[whole.sos] + whole.positional[0]
    front = ctx.to(whole.dtype) + whole.positional[1:lead]
    names = whole.token_embedding[rows.tokens.to(device)]
    names = names + whole.positional[rows.positions.to(device)]
    x = torch.cat((sos.expand(groups, 1, -1), front, names.expand(groups, -1, -1)), dim=1)
    for block in whole.blocks:
        h = reference.block_norm(x, block.ln_1_w, block.ln_1_b, whole.eps)
        qkv = torch.nn.functional.linear(h, block.qkv_w, block.qkv_b)
        q, k, v = (
            part.unflatten(-1, (whole.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        mixed = _flex()(q, k, v, block_mask=mask).transpose(1, 2).flatten(-2)
        x = x + torch.nn.functional.linear(mixed, block.out_w, block.out_b)
        h = reference.block_norm(x, block.ln_2_w, block.ln_2_b, whole.eps)
        h = torch.nn.functional.linear(h, block.fc_w, block.fc_b)
        h = reference.activate(h, whole.activation)
        x = x + torch.nn.functional.linear(h, block.proj_w, block.proj_b)
    x = x[:, lead - rows.shared + rows.ends.to(device)]
    x = reference.block_norm(x, whole.ln_w, whole.ln_b, whole.eps)
    return reference.unit_length(x @ whole.projection)


#: Data sets of the papers by their number of classes: OxfordPets, DTD, Caltech101 and CIFAR-100,
#: Flowers102, DomainNet, ImageNet.
CLASSES, SLOT_COUNTS, CONTEXTS = (37, 47, 100, 102, 345, 1000), (4, 16), (1, 2, 10, 100)
POINTS = [(c, t, g) for c in CLASSES for t in SLOT_COUNTS for g in CONTEXTS]
MAIN = [p for p in POINTS if sum(a != b for a, b in zip(p, (100, 16, 1), strict=True)) <= 1]
FAST = [f.name for f in FACES["encode_text"] if f.name != "reference"]
WAYS = ["literal", *CUT, "flex", *FAST]
DTYPES = ["float32", "bfloat16"]
#: The largest relative error that is timed.
LIMIT = {"float32": 1e-4, "bfloat16": 0.1}
MOST_SECONDS = 60.0


def operations(tokens: int, direction: str) -> float:
    """12 W² multiply-adds a token and layer; backward has the input gradients only."""
    return (2 if direction == "fwd+bwd" else 1) * 2 * tokens * LAYERS * 12 * WIDTH**2


def weight_bytes(whole: TextTower) -> float:
    """Bytes of the blocks: a pass reads them once, backward once more; all else is small."""
    return float(sum(t.nbytes for block in whole.blocks for t in vars(block).values()))


@functools.cache
def _exact(classes: int, slots: int, count: int, direction: str) -> Tensor:
    """The packed pass in float64, which tests/test_text.py proves against the literal one.

    The literal pass itself shows its error beside its time.
    """
    gc.collect()
    wide, ctx = tower().to("cpu", torch.float64), contexts(count, slots).cpu().double()
    with memory_limit(4 << 30):
        run = {"fwd": forward, "fwd+bwd": step}[direction]
        return run(lambda c: encode_text(wide, layout(classes, slots, "cpu"), c), ctx).to(DEVICE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(("classes", "slots", "count"), POINTS)
def bench_text(benchmark, request, classes, slots, count, direction, dtype, way):
    if (classes, slots, count) not in MAIN and not request.config.getoption("--all-sizes"):
        pytest.skip("not on the axes through C=100, T=16, one context; see --all-sizes")
    if way in FAST and (reasons := missing(way) or elsewhere(way)):
        pytest.skip("; ".join(reasons))
    if way == "flex" and DEVICE == "cpu" and direction == "fwd+bwd":
        pytest.skip("FlexAttention has no gradient on the CPU")
    kind = getattr(torch, dtype)
    if dtype == "bfloat16" and DEVICE == "cpu" and way in ("flex", *CUT):
        pytest.skip("on the CPU bfloat16 is compared with the literal tower alone")
    made = Way(way, classes, slots, kind)
    packed_rows = rows_of(made.layout, False).count + 1
    gemm = (min(count * packed_rows, 1 << 14), WIDTH, 4 * WIDTH)
    flops = operations(count * made.tokens(), direction)
    takes = flops / gemm_rate(*gemm, kind, DEVICE)
    if takes > MOST_SECONDS:
        pytest.skip(f"would take about {takes:.0f} s a call on this machine")
    ctx, run = contexts(count, slots), {"fwd": forward, "fwd+bwd": step}[direction]
    row = {"op": "encode_text", "C": classes, "T": slots, "G": count, "direction": direction}
    row |= {"dtype": dtype, "threads": torch.get_num_threads(), "device": DEVICE, "face": way}
    checked(
        benchmark,
        lambda: run(made, ctx),
        _exact(classes, slots, count, direction),
        LIMIT[dtype],
        rounds=1 if takes > 10 else 3 if takes > 1 else 7,
        flops=flops,
        gemm=gemm,
        moved=weight_bytes(made.tower) * (2 if direction == "fwd+bwd" else 1),
        **row,
    )
    benchmark.extra_info["tokens"] = count * made.tokens()


def missing(way: str) -> list[str]:
    (face,) = (f for f in FACES["encode_text"] if f.name == way)
    return face.missing()


@pytest.mark.parametrize("way", ["literal", *CUT, *FAST])
def bench_class_specific(benchmark, way):
    """Contexts that only one class has, as FedAPT's: nothing but SOS is shared."""
    if way in FAST and (reasons := missing(way) or elsewhere(way)):
        pytest.skip("; ".join(reasons))
    made = Way(way, 100, SLOTS, torch.float32, own=True)
    ctx = contexts(100)[None]
    wide = Way(FAST_HERE, 100, SLOTS, torch.float64, own=True)
    row = {"op": "encode_text", "C": 100, "T": SLOTS, "G": "1, class-specific"}
    row |= {"direction": "fwd+bwd", "dtype": "float32", "threads": torch.get_num_threads()}
    checked(
        benchmark,
        lambda: step(made, ctx),
        step(wide, ctx.double()),
        LIMIT["float32"],
        rounds=3,
        flops=operations(made.tokens(), "fwd+bwd"),
        gemm=(1 << 11, WIDTH, 4 * WIDTH),
        **row,
        device=DEVICE,
        face=way,
    )


def deep_step(way: str, dtype: torch.dtype) -> Tensor:
    """Features and the gradients of context and of eight layers' deep prompts: depth 9."""
    made, slots = Way(way, 100, 4, dtype), 4
    draw = torch.Generator().manual_seed(3)
    deep = (0.02 * torch.randn(8, slots, WIDTH, generator=draw)).to(DEVICE, dtype)
    leaves = [contexts(1, slots)[0].to(dtype).requires_grad_(), deep.requires_grad_()]
    with fastfpl.face("reference" if way == "literal" else way):
        features = encode_text(made.tower, made.layout, leaves[0], deep=leaves[1])
    weight = torch.randn(features.shape, generator=draw).to(features)
    grads = torch.autograd.grad((features * weight).sum(), leaves)
    return torch.cat([(x / x.norm()).flatten() for x in (features.detach(), *grads)])


@pytest.mark.parametrize("way", ["literal", *FAST])
def bench_deep(benchmark, way):
    """Prompts that are replaced layer by layer, as MaPLe's and PromptSRC's."""
    if way in FAST and (reasons := missing(way) or elsewhere(way)):
        pytest.skip("; ".join(reasons))
    made = Way(way, 100, 4, torch.float32)
    row = {"op": "encode_text", "C": 100, "T": 4, "G": "1, depth 9", "direction": "fwd+bwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE}
    checked(
        benchmark,
        lambda: deep_step(way, torch.float32),
        deep_step(FAST_HERE, torch.float64),
        LIMIT["float32"],
        rounds=3 if way == "literal" else 7,
        flops=operations(made.tokens(), "fwd+bwd"),
        gemm=(made.tokens(), WIDTH, 4 * WIDTH),
        **row,
        face=way,
    )
    benchmark.extra_info["tokens"] = made.tokens()


@pytest.mark.parametrize("limit", [None, "2GiB", "512MiB", "128MiB"])
@pytest.mark.parametrize("classes", [100, 1000])
def bench_memory(benchmark, classes, limit):
    """One step within a limit: what gradient caching costs, and the memory that it takes."""
    from fastfpl.ops.memory import parse_bytes

    made, ctx = Way(FAST_HERE, classes, SLOTS, torch.float32), contexts(1)

    def run() -> Tensor:
        with memory_limit(None if limit is None else parse_bytes("bench", limit)):
            return step(made, ctx)

    row = {
        "op": "encode_text within a limit",
        "C": classes,
        "T": SLOTS,
        "G": 1,
        "direction": "fwd+bwd",
    }
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE}
    checked(
        benchmark,
        run,
        _exact(classes, SLOTS, 1, "fwd+bwd"),
        LIMIT["float32"],
        rounds=3,
        flops=operations(made.tokens(), "fwd+bwd"),
        gemm=(made.tokens(), WIDTH, 4 * WIDTH),
        **row,
        face=f"limit {limit}",
    )


FAST_HERE = next(name for name in FAST if not missing(name) and not elsewhere(name))


@pytest.mark.parametrize("way", ["nine literal", FAST_HERE])
def bench_experts_of_a_round(benchmark, way):
    """Nine literal encodes, as each of ten clients does them, or all ten prompts at once.

    The released round is ten times the first row; it is not run in full because it takes minutes.
    """
    pool, classes = contexts(10), len(layout().eot)
    fast = way == FAST_HERE
    count = 10 if fast else 9
    made = Way(way if fast else "literal", 100, SLOTS, torch.float32)

    @torch.no_grad()
    def run() -> Tensor:
        return made(pool) if fast else torch.stack([made(one[None])[0] for one in pool[:9]])

    row = {"op": "encode_text", "C": classes, "T": SLOTS, "direction": "experts, fwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE, "face": way}
    exact = _exact(100, SLOTS, 10, "fwd")[:count]
    flops = operations(count * made.tokens(), "fwd")
    checked(benchmark, run, exact, 1e-4, rounds=5 if fast else 1, flops=flops, **row)
