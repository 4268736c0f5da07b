"""``pytest -p tests.pretended -m "not gpu"``: the tests that a machine with a card selects.

torch pretends to see one as far as tests ask it: kernels are compiled then, and the interpreter is
not there. What fails for that reason would fail on every card.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Let what goes to the card that is not there be skipped: it says nothing."""
    report = yield
    if report.failed and call.excinfo is not None and "NVIDIA driver" in str(call.excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: it needs the card itself")
    return report
