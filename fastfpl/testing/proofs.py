"""How single algorithms are proven: a step and whole rounds against their literal references."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfpl.federation import Federation
from fastfpl.methods import Batch, State
from fastfpl.testing.worlds import World, batch_of, drawn

__all__ = [
    "EVERYONE",
    "F32",
    "F64",
    "RELATIVE",
    "SELECTED",
    "assert_near",
    "assert_same_rounds",
    "assert_same_step",
    "first_images",
    "whole_rows",
]

#: The two that a method is proven in.
F32 = torch.float32
F64 = torch.float64
#: Of the largest number: the float32 of the requirements, and rounding of float64.
RELATIVE = {F32: 1e-5, F64: 1e-12}
#: Clients of four rounds: first-timers, returning clients, clients that sit rounds out, and one
#: that never comes (4).
SELECTED = [[0, 1, 3], [0, 2, 3], [0, 1, 2], [3, 1]]
#: The same where everybody trains first.
EVERYONE = [[0, 1, 2, 3, 4], [0, 2, 3], [1, 4], [3, 1]]


def assert_near(
    result: Tensor, exact: Tensor, dtype: torch.dtype, name: str, slack: float = 1
) -> None:
    """Refuse a result that is further from the exact one than `RELATIVE` of its largest number.

    Parameters
    ----------
    result : Tensor
    exact : Tensor, float64
        Of the same shape, not all zero.
    dtype : torch.dtype
        That the result must have.
    name : str
        What an error calls it.
    slack : float
        So many times as far is near.
    """
    assert result.dtype == dtype, name
    assert result.shape == exact.shape, name
    scale = exact.abs().max()
    assert scale > 0, name
    off = ((result.double() - exact).abs().max() / scale).item()
    assert off <= slack * RELATIVE[dtype], f"{name}: off by {off:.2e} of {scale:.2e}"


def first_images(world: World, size: int = 4) -> Batch:
    """Take the first images of every client; a masked place holds one of its own again."""
    count = len(world.clients)
    image = torch.zeros(count, size, world.tower.dim, dtype=world.dtype)
    labels = torch.zeros(count, size, dtype=torch.int64)
    mask = torch.zeros(count, size, dtype=torch.bool)
    for u, client in enumerate(world.clients):
        n = min(size, len(client.train))
        image[u, :n], labels[u, :n], mask[u, :n] = client.train[:n], client.train_labels[:n], True
        image[u, n:] = image[u, 0]
    assert not mask.all()
    return batch_of(image, labels, mask)


#: ``exact(client, values, image, labels)`` is the reference's loss of one client.
Exact = Callable[[int, Mapping[str, Tensor], Tensor, Tensor], Tensor]


def assert_same_step(
    world: World,
    federation: Federation,
    down: State,
    own: State,
    exact: Exact,
    vanishing: Sequence[str] = (),
) -> None:
    """Compare every client's loss and gradients away from the start, where nothing vanishes.

    The gradients of ``vanishing`` tensors are zero; what comes is rounding.
    """
    trained, fixed = federation.method.start(down, own, training=True)
    leaves = {
        name: (t + 0.1 * drawn(*t.shape, seed=50 + i, dtype=t.dtype)).requires_grad_()
        for i, (name, t) in enumerate(trained.items())
    }
    batch = first_images(world)
    text = federation.method.text(leaves, fixed)
    loss = federation.method.loss(text, leaves, fixed, batch)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    for u, client in enumerate(world.clients):
        mine = {name: t[u].detach().double().requires_grad_() for name, t in leaves.items()}
        n = int(batch.mask[u].sum())
        value = exact(u, mine, client.train[:n], client.train_labels[:n])
        assert_near(loss[u].detach(), value.detach(), world.dtype, f"client {u}, loss")
        wanted = torch.autograd.grad(value, list(mine.values()))
        noise = RELATIVE[world.dtype] * max(float(g.abs().max()) for g in wanted)
        for name, ours, theirs in zip(mine, gradients, wanted, strict=True):
            if name in vanishing:
                assert max(theirs.abs().max(), ours[u].abs().max()) < noise
            else:
                assert_near(ours[u], theirs, world.dtype, f"client {u}, gradient of {name}")


def assert_same_rounds(
    world: World,
    federation: Federation,
    outcomes: Sequence[Any],
    selected: Sequence[Sequence[int]],
    *,
    server: Callable[[Any], Mapping[str, Tensor]],
    kept: Callable[[Any], Mapping[int, Mapping[str, Tensor]]],
    moved_by: tuple[str, float] = ("ctx", 0.3),
) -> None:
    """Play the rounds and compare server, clients, losses and accuracies after each.

    ``server(outcome)`` and ``kept(outcome)`` say which tensors the library must hold. Something
    must move by the given share of a tensor's length.
    """
    vars(federation.sampling)["sample"] = lambda round_: list(selected[round_])
    begin = {name: t.clone() for name, t in federation.server.items()}
    for t, exact in enumerate(outcomes):
        row = federation.round()
        # the requirement is two rounds; every step amplifies the rounding of those before it
        slack = 1 if t < 2 else 10
        for name, tensor in server(exact).items():
            ours = federation.server[name]
            assert_near(ours, tensor, world.dtype, f"round {t}, {name}", slack)
        clients = kept(exact)
        assert set(federation.clients) == set(clients)
        for c, state in clients.items():
            assert set(federation.clients[c]) == set(state)
            for name, tensor in state.items():
                ours = federation.clients[c][name]
                assert_near(ours, tensor, world.dtype, f"round {t}, client {c}, {name}", slack)
        losses = [exact.losses[c] for c in sorted(exact.losses)]
        assert row["selected"] == list(selected[t]), f"round {t}, selected"
        assert math.isclose(row["loss"], sum(losses) / len(losses), rel_tol=1e-5), (
            f"round {t}, loss"
        )
        assert row["clients"] == exact.accuracy, f"round {t}, clients"
        mean = math.fsum(exact.accuracy) / len(exact.accuracy)
        assert math.isclose(row["accuracy"], mean, rel_tol=1e-6), f"round {t}, accuracy"
    # the proof is worth nothing if nothing moved
    moved = [_moved(begin[name], federation.server[name]) for name in server(outcomes[-1])]
    states = [*kept(outcomes[0]).values()], [*kept(outcomes[-1]).values()]
    moved += [b[name] - a[name] for a, b in zip(*states, strict=False) for name in a]
    name, share = moved_by
    assert max(m.norm() for m in moved) > share * begin[name].norm()
    assert len({tuple(o.accuracy) for o in outcomes}) > 1


def _moved(then: Tensor, now: Tensor) -> Tensor:
    """Return how far a server's tensor came; rows that it did not have came from nothing."""
    if then.shape == now.shape:
        return now - then
    return now - torch.cat((then, now.new_zeros(len(now) - len(then), *now.shape[1:])))


def whole_rows(world: World, template: str) -> tuple[Tensor, Tensor]:
    """Tokenise whole sentences, one a class: rows of SOS, everything, EOT, zeros; EOT's places."""
    names = world.classes.names
    rows = torch.zeros(len(names), world.tower.context_length, dtype=torch.int64)
    eot = []
    for c, ids in enumerate(world.clip.tokenize([template.format(name) for name in names])):
        line = [world.tower.sos, *ids, world.tower.eot]
        rows[c, : len(line)] = torch.tensor(line)
        eot.append(len(line) - 1)
    return rows, torch.tensor(eot)
