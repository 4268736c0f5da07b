"""The structures of the repositories: swapped and exact, or left with a reason."""

from __future__ import annotations

import copy

import pytest
import torch

import fastfpl
from tests.repository_style import TASKS, step
from tests.test_accelerate import COUNTS, assert_same, openai_clip


def images(count: int) -> torch.Tensor:
    shape = (count, 40) if count else (2, 5, 40)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", TASKS)
def test_structures_of_repositories(name):
    task = TASKS[name]
    torch.manual_seed(1)
    literal = task.make(openai_clip(layers=3), COUNTS, 4)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    for _ in range(2):
        want = step(task, literal, images(task.images))
        assert_same(step(task, model, images(task.images)), want)
    assert len(want) > 1, "something must be learned"
    calls = [call for f in fastfpl.explain(model).findings for call in f.calls]
    fast = [call for call in calls if call.startswith("fast")]
    if not task.reason:
        assert fast, str(fastfpl.explain(model))
        text = [c for c in calls if "diagonal matrices" not in c]
        assert text == fast, str(fastfpl.explain(model))
    elif calls:
        assert all(task.reason in call for call in calls), calls
