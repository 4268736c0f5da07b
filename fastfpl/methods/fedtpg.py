"""FedTPG: a shared network that writes the context from the class names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fastfpl.errors import InputError
from fastfpl.methods.base import Method, State, Task, Upload, weighted_mean
from fastfpl.methods.base import Options as _Options
from fastfpl.ops.text import encode_text
from fastfpl.seeds import generator

__all__ = ["FedTPG"]


class FedTPG(Method):
    """Clients train a prompt generator, which is averaged; the context is what it makes of T.

    T (C, D) are the text features of the bare class names, constants. T learned queries Q (T, W)
    attend to them, and a feed-forward layer follows:

        x = MultiHead(LN(Q), LN(T), LN(T)),   context = x + W_2 (a * gelu(b)) + b_2,
        [a, b] = W_1 LN(x) + b_1,

    so the context depends on the class list as a set, and the generator serves new classes. The
    attention has no residual, as the released code has it. Every client knows the names of all
    classes here; in the paper a client generates from the names that it holds.

    Source: Qiu et al. 2024 (FedTPG, ICLR), arXiv 2310.06123; layers as in its
    released code with one cross-attention and no self-attention.
    """

    name = "fedtpg"
    summary = "global network that generates the prompt from class names"
    sends = "the prompt generator"
    receives = "the prompt generator"

    class Options(_Options):
        """Options of FedTPG."""

        heads: int = Field(4, ge=1, description="heads of the cross-attention; divides W")
        widening: int = Field(4, ge=1, description="hidden width of the feed-forward layer over W")

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        width = task.classes.tower.width
        if width % self.options.heads:
            raise InputError(
                f"fastfpl.run: heads must divide the text width {width}; got {self.options.heads}"
            )
        if task.ctx_init is not None:
            raise InputError(
                "fastfpl.run: ctx_init must be left out for fedtpg, which generates its context; "
                f"got {task.ctx_init!r}"
            )

    def server_init(self) -> State:
        """Draw the generator: queries N(0, 0.02²), matrices as ``torch.nn`` draws its layers'."""
        tower = self.task.classes.tower
        width, dim, hidden = tower.width, tower.dim, self.options.widening * tower.width
        draw = generator(self.task.seed, "generator")

        def uniform(*shape: int, bound: float) -> Tensor:
            return bound * (2 * torch.rand(*shape, generator=draw, dtype=torch.float32) - 1)

        def xavier(rows: int, columns: int) -> Tensor:
            return uniform(rows, columns, bound=(6 / (rows + columns)) ** 0.5)

        state = {
            "query": 0.02
            * torch.randn(self.task.n_ctx, width, generator=draw, dtype=torch.float32),
            "ln_query_w": torch.ones(width, dtype=torch.float32),
            "ln_query_b": torch.zeros(width, dtype=torch.float32),
            "ln_names_w": torch.ones(dim, dtype=torch.float32),
            "ln_names_b": torch.zeros(dim, dtype=torch.float32),
            "w_q": xavier(width, width),
            "b_q": torch.zeros(width, dtype=torch.float32),
            "w_k": xavier(width, dim),
            "b_k": torch.zeros(width, dtype=torch.float32),
            "w_v": xavier(width, dim),
            "b_v": torch.zeros(width, dtype=torch.float32),
            "w_o": uniform(width, width, bound=width**-0.5),
            "b_o": torch.zeros(width, dtype=torch.float32),
            "ln_x_w": torch.ones(width, dtype=torch.float32),
            "ln_x_b": torch.zeros(width, dtype=torch.float32),
            "w_1": uniform(2 * hidden, width, bound=width**-0.5),
            "b_1": uniform(2 * hidden, bound=width**-0.5),
            "w_2": uniform(width, hidden, bound=hidden**-0.5),
            "b_2": uniform(width, bound=hidden**-0.5),
        }
        return {name: tensor.to(tower.device, self.task.dtype) for name, tensor in state.items()}

    def download(self, server: State, client: int, round_: int) -> State:
        """Send the generator."""
        return dict(server)

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the merged generator."""
        names = self._names().to(self.task.dtype)
        return dict(down), {"names": names.expand(len(down["query"]), -1, -1)}

    def _names(self) -> Tensor:
        """Encode the bare class names, constants of the run: (C, D)."""
        tower, layout = self.task.classes.tower, self.task.classes.with_ending("").layout(0)
        nothing = torch.zeros(0, tower.width, dtype=tower.dtype, device=tower.device)
        return self.task.text_features.get_or_encode(
            [("names", 0)], lambda key: nothing, lambda ctx: encode_text(tower, layout, ctx)
        )[0]

    def context(self, net: State, names: Tensor) -> Tensor:
        """Generate contexts (U, T, W) from stacked generators and name features (U, C, D)."""

        def linear(x: Tensor, layer: str) -> Tensor:
            return torch.baddbmm(net[f"b_{layer}"][:, None], x, net[f"w_{layer}"].mT)

        def norm(x: Tensor, layer: str) -> Tensor:
            plain = F.layer_norm(x, x.shape[-1:])
            return plain * net[f"ln_{layer}_w"][:, None] + net[f"ln_{layer}_b"][:, None]

        def heads(x: Tensor) -> Tensor:
            split: Tensor = x.unflatten(-1, (self.options.heads, -1))
            return split.transpose(1, 2)

        seen = norm(names, "names")
        q = heads(linear(norm(net["query"], "query"), "q"))
        mixed = F.scaled_dot_product_attention(
            q, heads(linear(seen, "k")), heads(linear(seen, "v"))
        )
        x = linear(mixed.transpose(1, 2).flatten(-2), "o")
        a, b = linear(norm(x, "x"), "1").chunk(2, dim=-1)
        return x + linear(a * F.gelu(b), "2")

    def text(self, trained: State, fixed: State) -> Tensor:
        """Generate the context and encode it."""
        return self.task.encode(self.one_context(trained, fixed))

    def one_context(self, trained: State, fixed: State) -> Tensor:
        """Generate the context."""
        return self.context(trained, fixed["names"])

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send the generator."""
        return dict(trained), own

    def merge(
        self, server: State, uploads: Mapping[int, Upload], images: Mapping[int, int], round_: int
    ) -> State:
        """Average every tensor of the generator."""
        return {
            name: weighted_mean(uploads, images, name, tensor) for name, tensor in server.items()
        }
