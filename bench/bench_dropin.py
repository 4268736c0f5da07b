"""Training steps of other people's structures, as they are and accelerated.

The structures are those of ``tests/repository_style.py``, in a text tower of 12 layers of width 512
in OpenAI's layout with random weights; names are CIFAR-100's in length. A row says how many tokens
its text passes compute: their ratio is what physics allows. ``--all-sizes`` runs all of them with
100 classes; without it the ones that are not named in ``LARGE`` have 20.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfpl
from bench.bench_text import LAYERS, WIDTH, operations
from bench.clock import DEVICE, checked
from tests.families import OpenAIClip
from tests.repository_style import TASKS, Task, step

SLOTS = 4
#: Tokens of CIFAR-100's names, and how often.
NAMES = [1] * 67 + [2] * 25 + [3] * 8
LARGE = ("CoOp, PromptFL", "MaPLe", "IVLP, PromptSRC")
#: The largest relative error that is timed.
LIMIT = 1e-4


@functools.cache
def weights() -> dict[str, Tensor]:
    """Draw the tower with the scales with which CLIP's is initialised."""
    clip = OpenAIClip(dim=512, length=77, width=WIDTH, layers=LAYERS, heads=8)
    draw, state = torch.Generator().manual_seed(0), clip.state_dict()
    out = WIDTH**-0.5 * (2 * LAYERS) ** -0.5
    for name, tensor in state.items():
        if "transformer" not in name or "visual" in name:
            continue
        if name.endswith("bias"):
            std = 0.01
        elif "ln_" in name:
            continue
        else:
            small = out if "proj" in name and "in_proj" not in name else WIDTH**-0.5
            std = (2 * WIDTH) ** -0.5 if "c_fc" in name else small
        tensor.copy_(std * torch.randn(tensor.shape, generator=draw))
    for name, std in (("token_embedding.weight", 0.02), ("positional_embedding", 0.01)):
        state[name].copy_(std * torch.randn(state[name].shape, generator=draw))
    return state


def model_of(task: Task, classes: int) -> nn.Module:
    clip = OpenAIClip(dim=512, length=77, width=WIDTH, layers=LAYERS, heads=8)
    clip.load_state_dict(weights())
    clip.eval().requires_grad_(False)
    torch.manual_seed(1)
    return task.make(clip, NAMES[:: 100 // classes], SLOTS).to(DEVICE)


def images(count: int) -> Tensor:
    shape = (count, 512) if count else (2, 49, 512)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the tokens of the text passes inside: those that are computed, and those asked for."""
    from fastfpl.dropin import text

    seen, run = [0, 0], text.encode_embedded

    def counting(
        tower: Any, prompts: Tensor, eot: Tensor, *, shared: int = 0, **rest: Any
    ) -> Tensor:
        groups = prompts.shape[:-3].numel()
        seen[0] += groups * int(shared + (eot + 1 - shared).sum())
        seen[1] += groups * len(eot) * tower.context_length
        return run(tower, prompts, eot, shared=shared, **rest)

    text.encode_embedded = counting
    try:
        yield seen
    finally:
        text.encode_embedded = run


@functools.cache
def built(name: str, classes: int, way: str) -> nn.Module:
    task = TASKS[name]
    model = model_of(task, classes)
    if way == "accelerated":
        fastfpl.accelerate(model)
        taken(task, model)  # proofs are made once
    return model


def taken(task: Task, model: nn.Module) -> Tensor:
    """A step's logits and gradients, measured by `even`."""
    return even(step(task, model, images(task.images)))


def even(found: dict[str, Tensor]) -> Tensor:
    """Divide by the largest number of whatever has the same owner, so that one limit judges all.

    Not by a tensor's own: the gradient of a key's bias is nothing but rounding, softmax cancels it.
    """
    sizes: dict[str, Tensor] = {}
    for name, t in found.items():
        owner = name.rpartition(".")[0] or name
        sizes[owner] = torch.maximum(sizes.get(owner, t.new_tensor(1e-30)), t.abs().max())
    scaled = [(t / sizes[name.rpartition(".")[0] or name]).flatten() for name, t in found.items()]
    return torch.cat(scaled)


@functools.cache
def tokens_of(name: str, classes: int) -> tuple[int, int]:
    with counted() as seen:
        taken(TASKS[name], built(name, classes, "accelerated"))
    return seen[0], seen[1]


@functools.cache
def exact(name: str, classes: int) -> Tensor:
    """The step in float64: the original's, which takes as long as it takes."""
    task = TASKS[name]
    model = copy.deepcopy(built(name, classes, "as it is")).double()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # its own casts down
        if isinstance(getattr(module, "dtype", None), torch.dtype) and "dtype" in vars(module):
            module.dtype = torch.float64
    return even(step(task, model, images(task.images).double()))


@pytest.mark.parametrize("way", ["as it is", "accelerated"])
@pytest.mark.parametrize("name", TASKS)
def bench_dropin(benchmark, request, name, way):
    large = name in LARGE or request.config.getoption("--all-sizes")
    classes = 100 if large else 20
    truth = exact(name, classes)
    model = built(name, classes, way)
    computed, asked = tokens_of(name, classes)
    tokens = computed if way == "accelerated" else asked
    row = {"op": "a step", "structure": name, "C": 1 if name == "one class" else classes}
    row |= {"T": SLOTS, "dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE}
    slow = way == "as it is" and asked > 4000
    checked(
        benchmark,
        lambda: taken(TASKS[name], model),
        truth,
        LIMIT,
        rounds=3 if slow else 7,
        flops=operations(tokens, "fwd+bwd") or None,
        **row,
        face=way,
    )
    benchmark.extra_info["tokens"] = tokens
    if way == "accelerated":
        calls = [call for f in fastfpl.explain(model).findings for call in f.calls]
        benchmark.extra_info["calls"] = calls
