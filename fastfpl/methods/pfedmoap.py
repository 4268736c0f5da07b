"""pFedMoAP: personalised mixture of prompt experts behind each client's own attention gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.features import TextKey
from fastfpl.methods import pool
from fastfpl.methods.base import Method, State, Task, Upload, weighted_mean
from fastfpl.methods.base import Options as _Options
from fastfpl.ops.gate import Gate, gate_experts
from fastfpl.reference import gate as reference
from fastfpl.seeds import generator

__all__ = ["PFedMoAP"]


class PFedMoAP(Method):
    """Clients download other clients' prompts as fixed experts and gate them by an own attention.

    The server holds the global prompt and the pool of last uploaded prompts. A client that takes
    part starts its prompt from the global one and receives the K prompts of the previous round's
    pool that are nearest to its own last upload. Its first participation is plain CoOp; from the
    second on it trains prompt and gate together. Logits are

        lambda * tau * <x, t_local> + tau * gate(pool(x), {pool(t_e)})

    where pool takes every r-th feature without normalising again. It is evaluated with its own
    prompt, gate and experts as trained, in the rounds that it sits out too: the paper's inference
    uses what the client has stored, so nobody gets neighbours that its gate has never seen (the
    released code selects them anew from the current pool). A client whose gate has not trained yet
    answers with its own prompt alone; one that never took part with the global prompt.

    A schedule scales the rate of prompts alone. The gate's is constant: the paper gives one number
    for it (0.01), and the released configuration pairs a cosine for prompts with a step of factor 1
    for the gate.

    Source: Luo et al. 2025 (pFedMoAP, ICLR), Algorithm 1 and equations 6 to 10.
    """

    name = "pfedmoap"
    summary = "mixture of other clients' prompts behind a personal gate"
    sends = "its prompt"
    receives = (
        "the global prompt; from its second participation on the prompts of other clients too"
    )
    personal = True
    evaluates_download = "trained"
    scores = "mixes experts behind a gate anew for every image"
    grows = pool.GROWS
    joins = 2  # the gate trains from the second time on

    class Options(_Options):
        """Options of pFedMoAP."""

        experts: int = Field(10, ge=1, description="experts of a client, its own prompt included")
        selection: Literal["nearest", "random"] = Field(
            "nearest", description="which prompts of the pool a client receives"
        )
        local_weight: float = Field(0.5, ge=0, description="lambda, weight of the local logits")
        heads: int = Field(8, ge=1, description="attention heads of the gate")
        gate_width: int = Field(128, ge=1, description="width of the gate; divides D")
        scaling: float = Field(10.0, gt=0, description="multiplies the gate's scores")
        gate_lr: float = Field(0.01, gt=0, description="learning rate of the gate")

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        width, dim = self.options.gate_width, task.classes.tower.dim
        if dim % width or width % self.options.heads:
            raise InputError(
                f"fastfpl.run: gate_width must divide D={dim} and be a multiple of "
                f"heads={self.options.heads}; got {width}"
            )
        self._stride = dim // width

    def server_init(self) -> State:
        """Hold the global prompt and an empty pool."""
        ctx = self.task.initial_ctx()
        # round of the upload
        return {"ctx": ctx, **pool.empty(ctx), "pool_round": torch.zeros(0, dtype=torch.int64)}

    def download(self, server: State, client: int, round_: int) -> State:
        """Send the global prompt and, from the second participation on, the chosen experts."""
        down = {"ctx": server["ctx"]}
        owner = server["pool_owner"]
        candidates = owner[owner != client].sort().values
        count = min(self.options.experts - 1, len(candidates))
        if pool.row_of(server, client) is None or count == 0:
            return down
        order = self._preference(server, client, candidates, round_)
        chosen = candidates[order[:count]].sort().values
        rows = pool.rows_of(server, chosen)
        return {
            **down,
            "experts": server["pool"][rows.to(server["pool"].device)],
            "expert_owner": chosen,
            "expert_round": server["pool_round"][rows],
        }

    def apart(self, down: State, number: int) -> State:
        """Give the experts other owners, which are encoded by themselves."""
        if "experts" not in down:
            return down
        return {**down, "expert_owner": down["expert_owner"] + number * self.task.clients}

    def _preference(self, server: State, client: int, candidates: Tensor, round_: int) -> Tensor:
        """Order clients of the pool (n,), the first choice first: positions (n,)."""
        if self.options.selection == "nearest":
            held = server["pool"].flatten(1)
            mine = held[pool.row_of(server, client)].double()
            rows = pool.rows_of(server, candidates).to(held.device)
            away = torch.cat(
                [torch.linalg.vector_norm(b - mine, dim=-1) for b in pool.blocks(held, rows)]
            )
            order: Tensor = away.argsort(stable=True).cpu()
            return order
        draw = generator(self.task.seed, "experts", round_, client)
        return torch.randperm(len(candidates), generator=draw)

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start the prompt from the global one and the gate from the client's own."""
        if not training:
            trained = {"ctx": own.get("ctx", down["ctx"])}
            gated = "experts" in down and "gate.w_q" in own
        else:
            trained = {"ctx": down["ctx"]}
            gated = "experts" in down
        if not gated:
            return trained, {}
        clients = down["experts"].shape[0]
        for name, tensor in self._common_gate().tensors().items():
            trained[f"gate.{name}"] = own.get(f"gate.{name}", tensor.expand(clients, *tensor.shape))
        return trained, {"experts": self._encode_experts(down)}

    def _common_gate(self) -> Gate:
        draw = generator(self.task.seed, "gate")
        return Gate.init(
            self.options.gate_width,
            self.options.heads,
            self.options.scaling,
            draw,
            device=self.task.classes.tower.device,
            dtype=self.task.dtype,
        )

    def _encode_experts(self, down: State) -> Tensor:
        """Encode every prompt that any client of the cohort received, once: (U, C, K, d)."""
        owner, version = down["expert_owner"].tolist(), down["expert_round"].tolist()
        keys: list[list[TextKey]] = [
            [(f"client-{o}", v) for o, v in zip(*pair, strict=True)]
            for pair in zip(owner, version, strict=True)
        ]
        where: dict[TextKey, tuple[int, int]] = {
            key: (u, k) for u, row in enumerate(keys) for k, key in enumerate(row)
        }
        features = self.task.text_features.get_or_encode(
            list(where), lambda key: down["experts"][where[key]], self.task.encode
        )
        row = {key: i for i, key in enumerate(where)}
        index = torch.tensor([[row[key] for key in line] for line in keys])
        pooled = features[..., :: self._stride]
        return pooled[index.to(pooled.device)].transpose(1, 2)

    def rate(self, name: str) -> float:
        """Return the gate's own learning rate for its tensors."""
        return self.options.gate_lr if name.startswith("gate.") else self.task.lr

    def scheduled(self, name: str) -> bool:
        """Return True for the prompt: the gate's rate is constant."""
        return not name.startswith("gate.")

    def logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Mix the local logits with the gated ones; plain CoOp where there are no experts."""
        return self._mixed(text, trained, fixed, image, gate_experts)

    def traced_logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Score by the literal gate."""
        return self._mixed(text, trained, fixed, image, reference.gate_experts)

    def _mixed(
        self,
        text: Tensor,
        trained: State,
        fixed: State,
        image: Tensor,
        gated: Callable[[Tensor, Tensor, Gate], Tensor],
    ) -> Tensor:
        """Mix the local logits with those that ``gated`` gives."""
        local = super().logits(text, trained, fixed, image)
        if "experts" not in fixed:
            return local
        gate = Gate(
            **{name: trained[f"gate.{name}"] for name in Gate.tensor_names()},
            heads=self.options.heads,
            scale=self.options.scaling,
        )
        mine = text[..., None, :: self._stride]
        experts = torch.cat((mine, fixed["experts"].to(text.dtype)), dim=-2).to(self.task.dtype)
        mixed = gated(image[..., :: self._stride].to(self.task.dtype), experts, gate)
        return self.options.local_weight * local + self.task.logit_scale * mixed

    def class_features(self, text: Tensor, trained: State, fixed: State) -> Tensor | None:
        """Return the own prompt's features of a client whose gate has not trained yet."""
        return None if "experts" in fixed else text

    def scoring_numbers(self, fixed: State, image: Sequence[int]) -> int:
        """Count the scores of the gate too, and their softmax: one a head, class and expert."""
        numbers = super().scoring_numbers(fixed, image)
        if "experts" in fixed:
            classes, experts = fixed["experts"].shape[1:3]
            numbers += 3 * self.options.heads * classes * (experts + 1)
        return numbers

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send the prompt; keep prompt and gate."""
        return {"ctx": trained["ctx"]}, {**own, **trained}

    def merge(
        self, server: State, uploads: Mapping[int, Upload], images: Mapping[int, int], round_: int
    ) -> State:
        """Average the prompts and refresh the pool with them."""
        return {
            "ctx": weighted_mean(uploads, images, "ctx", server["ctx"]),
            **pool.refreshed(server, uploads, {"pool_round": round_}),
        }
