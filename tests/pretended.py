"""``pytest -p tests.pretended -m "not gpu"``: the tests that a machine with a card selects.

torch pretends to see one as far as tests ask it: kernels are compiled then, and the interpreter is
not there. What fails for that reason would fail on every card, and in every row of a test: of each
test and face one row is played.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first row of every test and face."""
    from fastfpl.ops.faces import NAMES

    rows: dict[tuple[str, ...], pytest.Item] = {}
    for item in items:
        call = getattr(item, "callspec", None)
        words = [v for v in call.params.values() if isinstance(v, str)] if call else []
        faces = sorted(set(words) & set(NAMES))
        rows.setdefault((item.nodeid.partition("[")[0], *faces), item)
    kept = set(rows.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Let what goes to the card that is not there be skipped: it says nothing."""
    report = yield
    if report.failed and call.excinfo is not None and "NVIDIA driver" in str(call.excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: it needs the card itself")
    return report
