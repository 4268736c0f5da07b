"""Every bench puts all that it computes with on its device, shown without a card.

Benches run with DEVICE = "meta" up to their first launch, or to the first number that a host reads:
there are none. Whatever meets a tensor that was left on the CPU before that is a fault: a mode sees
every operation, for torch itself lets many pass (products, embeddings, indices). Truths are left
out; what is timed is not. What is behind that number, and accelerated models, which are proven by
numbers before they run, is not shown here.
"""

import importlib
import sys
import types

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from bench.first_steps import BENCHES
from fastfpl.errors import FastfplError

#: One row of every bench: by file, function and arguments.
ROWS = [
    ("attention", "bench_forward_backward", {"classes": 100, "groups": 1, "face": "torch"}),
    ("entropic", "bench_sinkhorn", {"reg": 0.1, "face": "reference"}),
    ("transport", "bench_plan", {"face": "triton"}),
    ("transport", "bench_plan", {"face": "published"}),
    ("transport", "bench_balanced", {"face": "triton"}),
    ("transport", "bench_logits_forward_backward", {"face": "triton"}),
    ("transport", "bench_logits_forward_backward", {"face": "published"}),
    ("transport", "bench_logits_forward_backward", {"face": "gemms"}),
    ("gate", "bench_gate", {"direction": "fwd+bwd", "way": "literal"}),
    ("gate", "bench_gate", {"direction": "fwd+bwd", "way": "torch"}),
    ("gate", "bench_gate", {"direction": "fwd", "way": "sdpa"}),
    ("gate", "bench_cohort", {"way": "best"}),
    ("embedded", "bench_embedded", {"face": "literal"}),
    ("embedded", "bench_embedded", {"face": "torch"}),
    ("text", "bench_text", {"direction": "fwd+bwd", "dtype": "bfloat16", "way": "literal"}),
    ("text", "bench_text", {"direction": "fwd+bwd", "dtype": "float32", "way": "cut"}),
    ("text", "bench_text", {"direction": "fwd", "dtype": "float32", "way": "torch"}),
    ("text", "bench_class_specific", {"way": "torch"}),
    ("text", "bench_deep", {"way": "torch"}),
    ("text", "bench_memory", {"classes": 100, "limit": None}),
    ("text", "bench_experts_of_a_round", {"way": "nine literal"}),
    ("dropin", "bench_dropin", {"name": "CoOp, PromptFL", "way": "as it is"}),
    ("dropin", "bench_dropin", {"name": "CLIP-Adapter", "way": "as it is"}),
    *(
        ("step", "bench_step", {"name": name, "way": way})
        for name in ("promptfl", "pfedmoap", "fedotp", "fedpgp")
        for way in ("literal", "ours")
    ),
    ("step", "bench_experts_of_a_client_round", {"way": "literal"}),
    ("round", "bench_round", {"name": "promptfl", "cohort": 4}),
    ("round", "bench_literal_client", {"name": "promptfl"}),
    ("round", "bench_round_from_images", {"cohort": 4}),
    ("round", "bench_thousand_classes", {"name": "promptfl", "limit": "8GiB"}),
]
DEFAULTS = {
    "transport": {"problems": 320, "patches": 49, "prompts": 2, "eps": 0.1},
    "text": {"classes": 100, "slots": 16, "count": 1},
}
#: What is there to judge by, or takes a number from the host: not what is timed.
TRUTHS = ("exact", "_exact", "exact_step", "tokens_of", "gemm_rate")
#: A number that is not there was asked for.
UNREAD = ("meta tensor", "nonzero()")


class Reached(Exception):
    """The bench came to its time."""


class OnePlace(TorchDispatchMode):
    """Refuse every operation between the bench's device and the CPU, but for copies.

    Whole numbers that were made on the host or copied from there (layouts, indices, labels) keep
    their values, so that a host may read them again.
    """

    def __init__(self):
        super().__init__()
        self.seen = 0
        self._known = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if x.device.type == "meta"]
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0] in self._known:
            return self._known[args[0]].item()
        if name == "_to_copy" and args[0] in self._known and str(kwargs.get("device")) == "cpu":
            return func(self._known[args[0]], **kwargs)
        if name not in ("_to_copy", "copy_", "_copy_from"):
            # torch takes indices from the host, and copies them: slow on a card, but right
            whole = name in ("index", "index_put", "index_put_", "_index_put_impl_")
            left = [x for x in tensors if x.device.type == "cpu" and x.dim()]
            left = [x for x in left if not (whole and x.dtype == torch.int64)]
            self.seen += bool(there)
            assert not (there and left), f"{name}: on the CPU {[tuple(x.shape) for x in left]}"
        lands = there or str(kwargs.get("device")) == "meta"
        if not lands or any(x.dtype.is_floating_point for x in tensors):
            return func(*args, **kwargs)
        if any(x not in self._known for x in there):
            return func(*args, **kwargs)
        onto = {"device": torch.device("cpu")} if "device" in kwargs else {}
        given = tree_map(self._value, (args, kwargs))
        values = func(*given[0], **(given[1] | onto))
        try:
            found = func(*args, **kwargs)
        except NotImplementedError:  # its shape follows from values
            found = tree_map(lambda x: torch.empty_like(x, device="meta"), values)
        for one, value in zip(tree_leaves(found), tree_leaves(values), strict=True):
            if isinstance(one, Tensor) and not one.dtype.is_floating_point:
                self._known[one] = value.clone() if name == "_to_copy" else value
        return found

    def _value(self, x):
        return self._known[x] if isinstance(x, Tensor) and x.device.type == "meta" else x


@pytest.fixture(scope="module")
def benches():
    """Import the benches anew, for a device that computes nothing."""
    before = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "bench"}
    clock = importlib.import_module("bench.clock")
    clock.DEVICE = "meta"

    def checked(benchmark, run, exact, limit, rounds=None, *, result_on="meta", **row):
        assert row["device"] == "meta"
        result = run()
        assert result.device.type == result_on
        raise Reached

    clock.checked = checked
    clock.gemm_rate = lambda *_: 1e12
    clock.peak_bytes = lambda run, device: run() and None
    found = {name: importlib.import_module(f"bench.bench_{name}") for name in BENCHES}
    yield found, OnePlace()  # one for all: what benches keep is known to it
    for name in [n for n in sys.modules if n.split(".")[0] == "bench"]:
        del sys.modules[name]
    sys.modules.update(before)


def arguments(file, function, given):
    config = types.SimpleNamespace(getoption=lambda name: "")
    benchmark = types.SimpleNamespace(extra_info={}, stats=None)
    every = {"benchmark": benchmark, "request": types.SimpleNamespace(config=config)}
    every |= DEFAULTS.get(file, {}) | given
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return {name: every[name] for name in names}


def small(name):
    """A model with ViT-B-16's text tower; drawing the weights of its image tower takes seconds."""
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(512, CLIPVisionCfg(layers=1, width=64, patch_size=16), CLIPTextCfg())


def said(file, function, given):
    return "-".join([file, function.removeprefix("bench_"), *map(str, given.values())])


def right(end):
    """Say whether a bench came to its time, to a launch or to a number that is not there."""
    if isinstance(end, FastfplError):  # a launcher asks where its tensors are
        return "is on meta, not on a CUDA device" in str(end) and "on the CPU" not in str(end)
    return isinstance(end, Reached) or any(words in str(end) for words in UNREAD)


@pytest.mark.parametrize(
    ("file", "function", "given"), [pytest.param(*r, id=said(*r)) for r in ROWS]
)
def test_what_is_timed_is_on_the_device(benches, monkeypatch, file, function, given):
    benches, mode = benches
    module = benches[file]
    if file == "gate":
        given = given | {"size": module.Size(1, 32, 100, 10)}
    for each in benches.values():
        for name in TRUTHS:
            if hasattr(each, name):
                nothing = torch.empty(10**6, device="meta")
                pair = (nothing, 1) if (each, name) == (benches["transport"], "exact") else nothing
                if (each, name) == (benches["gate"], "exact"):
                    # broadcasts with every gradient
                    pair = nothing, 9 * (torch.empty((), device="meta"),)
                pair = (1, 1) if name == "tokens_of" else 1e12 if name == "gemm_rate" else pair
                monkeypatch.setattr(each, name, lambda *_, pair=pair: pair)
    if function == "bench_round_from_images":
        monkeypatch.setattr("open_clip.create_model", small)
    run = getattr(module, function)
    end = None
    mode.seen = 0
    with mode:
        try:
            run(**arguments(file, run, given))
        except (Reached, FastfplError, RuntimeError, TypeError) as reached:
            end = reached
    assert right(end), repr(end)
    assert mode.seen or isinstance(end, FastfplError)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there @ here.T,
        lambda there, here: here.T @ there,
        lambda there, here: torch.nn.functional.linear(there, here),
        lambda there, here: torch.einsum("ij,kj->ik", here, there),
        lambda there, here: torch.where(there > 0, here, there),
        lambda there, here: torch.nn.functional.embedding(here.long(), there),
    ],
)
def test_what_was_left_on_the_host_is_seen(mixed):
    with OnePlace(), pytest.raises(AssertionError, match="on the CPU"):
        mixed(torch.empty(3, 4, device="meta"), torch.ones(3, 4))


def test_whole_numbers_can_be_read_again_and_others_cannot():
    with OnePlace():
        index = torch.tensor([3, 1, 2]).to("meta")
        assert (index[1:] + torch.arange(2, device="meta")).tolist() == [1, 3]
        assert int(index.max()) == 3
        assert (index == 1).nonzero().cpu().tolist() == [[1]]
        index += 1
        assert index.cpu().tolist() == [4, 2, 3]
        with pytest.raises(RuntimeError, match="meta tensor"):
            float(torch.ones(1).to("meta"))


def test_every_bench_has_a_row():
    for name in BENCHES:
        module = importlib.import_module(f"bench.bench_{name}")
        found = {n for n in vars(module) if n.startswith("bench_") and callable(getattr(module, n))}
        here = {n for n in found if getattr(module, n).__module__ == module.__name__}
        assert here == {function for file, function, _ in ROWS if file == name}
