"""The packed pass over embedded prompts against the literal one: values, gradients, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError, NotSupported
from fastfpl.ops.embedded import encode_embedded
from fastfpl.ops.faces import face
from fastfpl.ops.memory import memory_limit
from tests.test_text import random_tower
from tests.truth import assert_as_good_as_eager, fenced

ENDS = [7, 3, 12, 5, 4, 39, 3]


def prompts_of(lead=(), ends=ENDS, shared=0, width=24, length=40, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(*lead, len(ends), length, width, generator=generator, dtype=dtype)
    prompts[..., :, :shared, :] = prompts[..., :1, :shared, :].clone()
    return prompts


def both(tower, prompts, eot, shared):
    """States and gradients of the packed and of the literal pass."""
    results = []
    for name in ("torch", "reference"):
        leaf = prompts.clone().requires_grad_()
        with face(name):
            states = encode_embedded(tower, leaf, eot, shared=shared)
        weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        (states * weight.to(states.dtype)).sum().backward()
        results.append((states.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("lead", [(), (3,), (2, 1)])
@pytest.mark.parametrize("shared", [0, 1, 3])
def test_packed_is_the_literal_pass(lead, shared):
    tower = random_tower(activation="gelu" if shared == 1 else "quick_gelu")
    got, want = both(tower, prompts_of(lead, shared=shared), torch.tensor(ENDS), shared)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    assert got[0].shape == (*lead, len(ENDS), tower.width)
    assert (got[0][..., 0, :] - got[0][..., 1, :]).abs().max() > 1e-3


@pytest.mark.parametrize("ends", [[0], [0, 0, 5], [5], [2] * 70, [39, 1]])
def test_odd_sizes(ends):
    tower = random_tower(depth=1)
    got, want = both(tower, prompts_of(ends=ends), torch.tensor(ends), 0)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_the_shared_rows_are_the_first_classes():
    """Value and gradient: what the other classes have there is not read."""
    tower, prompts = random_tower(), prompts_of(shared=3)
    other = prompts.clone()
    other[1:, :3] = float("nan")
    leaf = other.requires_grad_()
    states = encode_embedded(tower, leaf, torch.tensor(ENDS), shared=3)
    assert torch.equal(
        states.detach(), encode_embedded(tower, prompts, torch.tensor(ENDS), shared=3)
    )
    states.sum().backward()
    assert bool((leaf.grad[1:, :3] == 0).all())
    assert bool((leaf.grad[0, :3] != 0).any(-1).all())


def test_what_follows_the_eot_is_never_read():
    tower, prompts = random_tower(), prompts_of()
    want = encode_embedded(tower, prompts, torch.tensor(ENDS))
    for row, end in zip(prompts, ENDS, strict=True):
        row[end + 1 :] = float("nan")
    assert torch.equal(encode_embedded(tower, fenced(prompts), torch.tensor(ENDS)), want)


def test_gradcheck():
    tower = random_tower(width=6, heads=2, depth=2, dim=3, length=5)
    prompts = prompts_of(ends=[3, 4, 2], width=6, length=5).requires_grad_()
    eot = torch.tensor([3, 4, 2])
    assert torch.autograd.gradcheck(lambda x: encode_embedded(tower, x, eot), prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_as_good_as_the_literal_pass(dtype):
    tower = random_tower()
    narrow = tower.to("cpu", dtype)
    prompts = prompts_of((2,), shared=2)
    exact = both(narrow.to("cpu", torch.float64), prompts.to(dtype).double(), torch.tensor(ENDS), 2)
    got, want = both(narrow, prompts.to(dtype), torch.tensor(ENDS), 2)
    for mine, theirs, truth in zip(got, want, exact[1], strict=True):
        assert mine.dtype == dtype
        assert_as_good_as_eager(mine, theirs, truth)


def test_views_and_chunks(monkeypatch):
    tower, prompts = random_tower(), prompts_of((4,))
    want = encode_embedded(tower, prompts, torch.tensor(ENDS))
    turned = prompts.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(encode_embedded(tower, turned, torch.tensor(ENDS)), want)
    same = prompts[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(
        encode_embedded(tower, same, torch.tensor(ENDS)), want[:1].expand(4, -1, -1)
    )
    monkeypatch.setattr("fastfpl.ops.embedded._ROWS_PER_PASS", 1)
    torch.testing.assert_close(encode_embedded(tower, prompts, torch.tensor(ENDS)), want)


def test_inference_mode_leaves_nothing_that_training_trips_over():
    tower, ends = random_tower(), [4, 9, 2]
    prompts, eot = prompts_of(ends=ends), torch.tensor(ends)
    with torch.inference_mode():
        encode_embedded(tower, prompts, eot, shared=1)
    leaf = prompts.clone().requires_grad_()
    encode_embedded(tower, leaf, eot, shared=1).sum().backward()
    assert bool(leaf.grad.isfinite().all())


def test_bad_input_is_refused():
    tower, prompts, eot = random_tower(), prompts_of(), torch.tensor(ENDS)
    with pytest.raises(InputError, match=r"prompts must have shape \(\.\.\., C, L, W\); got"):
        encode_embedded(tower, prompts[..., :5], eot)
    with pytest.raises(InputError, match=r"prompts must have shape .* with C=3"):
        encode_embedded(tower, prompts, eot[:3])
    with pytest.raises(KindError, match=r"prompts must be floating point; got torch\.int64"):
        encode_embedded(tower, prompts.long(), eot)
    with pytest.raises(KindError, match="prompts must be on the tower's device cpu; got meta"):
        encode_embedded(tower, prompts.to("meta"), eot)
    with pytest.raises(InputError, match="at most 40 tokens; got 41"):
        encode_embedded(tower, torch.cat([prompts, prompts[:, :1]], dim=1), eot)
    with pytest.raises(InputError, match=r"eot must lie in \[0, 20\) for every class"):
        encode_embedded(tower, prompts[:, :20], eot)
    with pytest.raises(InputError, match="shared must be from 0 to 3; got 4"):
        encode_embedded(tower, prompts, eot, shared=4)
    with memory_limit(1 << 30), pytest.raises(NotSupported, match="torch: it keeps to no memory"):
        encode_embedded(tower, prompts, eot)
