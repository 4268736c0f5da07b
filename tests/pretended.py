"""``pytest -p tests.pretended -m "not gpu"``: the tests that a machine with a card selects.

torch pretends to see one as far as tests ask it: kernels are compiled then, and the interpreter is
not there. What fails for that reason would fail on every card.
"""

from __future__ import annotations

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
