"""`check_method` proves that an algorithm keeps the contract of `fastfpl.methods.Method`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.errors import InputError, KindError
from fastfpl.features import TextFeatures
from fastfpl.methods import Batch, Method, State, Task
from fastfpl.methods.contract import (
    asked,
    check_gradients,
    check_logits,
    check_loss,
    check_merged,
    check_state,
    check_states,
    check_text,
    furthest,
    refusal,
)
from fastfpl.prompts import ClassPrompts
from fastfpl.seeds import generator

__all__ = ["check_method"]

# sizes that no method confuses: clients of a cohort, clients of the federation, images
_COHORT, _CLIENTS, _IMAGES, _TRAINING = 3, 5, 4, 7
_NAMES = ("cat", "sea horse", "owl", "long eared bat", "fox", "elk")
# of the largest number, in float64
_ROUNDING = 1e-9
_RATE = 0.05


def check_method(
    method: type[Method],
    options: Mapping[str, Any] | None = None,
    *,
    clip: FrozenCLIP | None = None,
    rounds: int = 3,
) -> None:
    """Prove on a small task that a method keeps the contract of `fastfpl.methods.Method`.

    A few rounds are played by hand in float64: five clients, of whom three take part, one for the
    first time in the last round. In each round every verb is called on the cohort; then again
    with one client changed, and for one client alone.

    Parameters
    ----------
    method : type of Method
    options : mapping, optional
        Its options.
    clip : FrozenCLIP, optional
        The embedded `tiny` if left out; float64 shows the smallest mistakes.
    rounds : int
        Rounds that are played, at least 2; more where a method changes with the rounds.

    Raises
    ------
    InputError
        With the method's name, the verb and what it does wrong: shapes without the client
        dimension, a loss that is not one number a client, a trained tensor without a gradient,
        numbers that are not finite, clients that see each other (in values or gradients), draws
        that differ from call to call, arguments that are changed, what travels by a name that
        nobody asks for, a merge that depends on the order of uploads.
    KindError
        If ``method`` is no subclass of Method.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise KindError(f"fastfpl.testing: method must be a subclass of Method; got {method!r}")
    if rounds < 2:
        raise InputError(f"fastfpl.testing: rounds must be 2 or more; got {rounds}")
    _check_class(method)
    if clip is None:
        clip = load_clip("tiny").to(dtype=torch.float64)
    _Proof(method, options, clip).play(rounds)


def _check_class(method: type[Method]) -> None:
    """Look at the attributes of the class."""
    allowed = {
        "evaluates_download": ("merged", "trained"),
        "image_kind": ("pooled", "raw", "patches"),
    }
    for name in ("name", "summary"):
        value = getattr(method, name, None)
        if not isinstance(value, str) or not value:
            raise InputError(
                f"fastfpl.methods: {method.__name__}'s {name} must be a text; got {value!r}"
            )
    for name, values in allowed.items():
        value = getattr(method, name)
        if value not in values:
            raise InputError(
                f"fastfpl.methods: {method.name}'s {name} must be one of {', '.join(values)}; "
                f"got {value!r}"
            )
    if method.scored_together < 1:
        raise InputError(
            f"fastfpl.methods: {method.name}'s scored_together must be positive; "
            f"got {method.scored_together}"
        )


@dataclass
class _Cohort:
    """Stacked states of a cohort and the images of one step."""

    down: State
    own: State
    batch: Batch
    whole: Batch

    def rows(self, rows: slice) -> _Cohort:
        """Return some of its clients."""
        return _Cohort(
            _rows(self.down, rows),
            _rows(self.own, rows),
            _batch_rows(self.batch, rows),
            _batch_rows(self.whole, rows),
        )

    def changed(self, u: int, apart: Callable[[State, int], State]) -> _Cohort:
        """Return the cohort with other numbers at client ``u``, its download set apart."""
        down = _copied(self.down)
        for name, tensor in apart({n: t[u] for n, t in self.down.items()}, 1).items():
            down[name][u] = tensor
        return _Cohort(
            _changed(down, u),
            _changed(self.own, u),
            _batch_changed(self.batch, u),
            _batch_changed(self.whole, u),
        )


@dataclass
class _Seen:
    """What the verbs gave for one cohort, by verb and name, one row a client."""

    values: dict[tuple[str, str], Tensor]
    upload: State
    own: State


class _Proof:
    """One method on one small task."""

    def __init__(
        self, kind: type[Method], options: Mapping[str, Any] | None, clip: FrozenCLIP
    ) -> None:
        classes = ClassPrompts(clip, _NAMES)
        self.task = Task(
            classes=classes,
            logit_scale=clip.logit_scale,
            clients=_CLIENTS,
            domains=("ink", "photo"),
            client_domains=tuple(c % 2 for c in range(_CLIENTS)),
            n_ctx=4,
            ctx_init=None,
            lr=_RATE,
            seed=0,
            text_features=TextFeatures(),
        )
        self.clip = clip
        self.method = kind(self.task, options)

    def refuse(self, verb: str, rule: str, got: str) -> InputError:
        return refusal(self.method, verb, rule, got)

    # -- the rounds ----------------------------------------------------------------------------

    def play(self, rounds: int) -> None:
        method = self.method
        server = check_state(method, "server_init", method.server_init())
        self._same("server_init", server, check_state(method, "server_init", method.server_init()))
        kept: dict[int, State] = {}
        if not method.trains:
            down = self._downloads(server, range(1), 0)
            self._evaluate(_Cohort(down, {}, self._images([0]), self._images([0], _TRAINING)))
            return
        for round_ in range(rounds):
            # client 3 comes for the first time in the last round, client 4 never does
            members = [0, 1, 3 if round_ == rounds - 1 else 2]
            server = self._round(server, kept, members, round_)
            for client in range(_CLIENTS):
                down = self._downloads(server, [client], round_ + 1)
                own = kept.get(client, {}) if method.personal else {}
                images = self._images([client]), self._images([client], _TRAINING)
                self._evaluate(_Cohort(down, _stack([own]), *images))

    def _round(
        self, server: State, kept: dict[int, State], members: list[int], round_: int
    ) -> State:
        before = _copied(server)
        downs = {c: self._download(server, c, round_) for c in members}
        self._unchanged("download", before, server)
        uploads: dict[int, State] = {}
        for group in _alike(members, downs, kept):
            cohort = _Cohort(
                _stack([downs[c] for c in group]),
                _stack([kept.get(c, {}) for c in group]),
                self._images(group),
                self._images(group, _TRAINING),
            )
            seen = self._train(cohort)
            for u, client in enumerate(group):
                uploads[client] = {n: t[u].clone() for n, t in seen.upload.items()}
                # an empty state leaves what was there, as on disk
                kept[client] = {n: t[u].clone() for n, t in seen.own.items()} or kept.get(
                    client, {}
                )
        return self._merge(server, uploads, round_)

    def _downloads(self, server: State, clients: Any, round_: int) -> State:
        return _stack([self._download(server, c, round_) for c in clients])

    def _download(self, server: State, client: int, round_: int) -> State:
        def ask() -> State:
            self.task.text_features.clear()
            with asked(self.method, "download", server=server):
                return check_state(
                    self.method, "download", self.method.download(server, client, round_)
                )

        down = ask()
        self._same("download", down, ask())
        return down

    def _images(self, clients: list[int], count: int = _IMAGES) -> Batch:
        """Draw images of the method's kind; the last one of every client but the first is masked.

        Whole training sets have no mask.
        """
        clip, kind = self.clip, self.method.image_kind
        shape: tuple[int, ...] = (count, clip.dim)
        if kind == "patches":
            shape = (count, clip.patches or 1, clip.dim)
        stacked, strong, labels = [], [], []
        for client in clients:
            draw = generator(1, "images", client)
            image, other = (
                torch.randn(shape, generator=draw, dtype=torch.float32) for _ in range(2)
            )
            labels.append(torch.randint(len(_NAMES), (count,), generator=draw))
            stacked.append(_unit(image) if kind != "raw" else image)
            strong.append(_unit(other) if kind != "raw" else other)
        like = clip.text.token_embedding
        mask = torch.ones(len(clients), count, dtype=torch.bool)
        if count == _IMAGES:
            mask[1:, -1] = False
        domains = torch.tensor([self.task.client_domains[c] for c in clients])  # type: ignore[index]
        batch = Batch(
            image=torch.stack(stacked).to(like),
            labels=torch.stack(labels),
            domains=domains[:, None].expand(-1, count),
            positions=torch.arange(count).expand(len(clients), count),
            mask=mask,
            strong=torch.stack(strong).to(like) if self.method.paired else None,
        )
        return _mapped(batch, lambda t: t.to(like.device).contiguous())

    # -- a cohort ------------------------------------------------------------------------------

    def _train(self, cohort: _Cohort) -> _Seen:
        """Call every verb of a training step, and look whether clients see each other."""
        clients = len(cohort.batch.labels)
        first = self._step(cohort)
        again = self._step(cohort)
        for (verb, name), value in first.values.items():
            if not _near(value, again.values[verb, name], exact=True):
                rule = "give the same for the same arguments"
                raise self.refuse(verb, rule, f"another {name!r} the second time")
        if clients > 1:
            for u in range(clients):
                self._compare(first, self._step(cohort.changed(u, self.method.apart)), u)
            for u in range(clients):
                alone = self._step(cohort.rows(slice(u, u + 1)))
                for (verb, name), value in alone.values.items():
                    wanted = first.values[verb, name][u : u + 1]
                    if value.shape != wanted.shape or not _near(value, wanted):
                        rule = "give a client the same alone as in a cohort"
                        raise self.refuse(verb, rule, f"another {name!r} of client {u}")
        return first

    def _compare(self, first: _Seen, other: _Seen, u: int) -> None:
        """Refuse a verb of which other clients see that client ``u`` has changed."""
        for (verb, name), value in first.values.items():
            rest = [v for v in range(len(value)) if v != u]
            if not _near(value[rest], other.values[verb, name][rest]):
                rule = "look at no other client of the cohort"
                raise self.refuse(
                    verb, rule, f"another {name!r} of clients {rest} after a change of client {u}"
                )

    def _step(self, cohort: _Cohort) -> _Seen:
        """Start, take one step by plain gradient descent, finish."""
        method, clients = self.method, len(cohort.batch.labels)
        values: dict[tuple[str, str], Tensor] = {}

        def note(verb: str, state: State) -> None:
            wrong = furthest({verb: state}, clients)
            if wrong is not None:
                rule = "return finite numbers"
                raise self.refuse(verb, rule, f"{wrong[3]:g} in {wrong[1]!r}")
            for name, tensor in state.items():
                values[verb, name] = tensor.detach().clone()

        self.task.text_features.clear()
        sides = {"download": _copied(cohort.down), "own": _copied(cohort.own)}
        trained, fixed = self._start(cohort, training=True)
        if not trained:
            raise self.refuse("start", "return what is trained", "nothing")
        for name, tensor in trained.items():
            if not tensor.is_floating_point():
                raise self.refuse(
                    "start", f"train floating point; {name!r} is not", str(tensor.dtype)
                )
        note("start", {**fixed, **trained})
        self._unchanged("start", sides["download"], cohort.down)
        self._unchanged("start", sides["own"], cohort.own)
        trained, fixed = _copied(trained), dict(fixed)
        with torch.no_grad():
            if method.surveys(fixed):
                text = method.text(trained, fixed)
                check_text(method, text, clients)
                with asked(method, "survey", trained=trained, fixed=fixed):
                    more = method.survey(text, trained, fixed, cohort.whole)
                note("survey", check_states(method, "survey", (more, {}), clients)[0])
                fixed |= more
        leaves = {name: t.clone().requires_grad_() for name, t in trained.items()}
        with asked(method, "text", trained=leaves, fixed=fixed):
            text = method.text(leaves, fixed)
        check_text(method, text, clients)
        note("text", {"features": text})
        with asked(method, "loss", trained=leaves, fixed=fixed):
            loss, _ = method.measured_loss(text, leaves, fixed, cohort.batch)
        check_loss(method, loss, clients)
        note("loss", {"loss": loss})
        gradients = self._gradients(loss, text, leaves)
        note("loss", {f"gradient of {name}": g for name, g in gradients.items()})
        with torch.no_grad():
            with asked(method, "after_step", trained=leaves, fixed=fixed):
                fresh = method.after_step(text, leaves, fixed, cohort.batch)
            note("after_step", check_states(method, "after_step", (fresh, {}), clients)[0])
            for name in fresh:
                if name not in fixed:
                    raise self.refuse("after_step", "return tensors of fixed", repr(name))
            fixed |= fresh
            moved = {n: t.detach() - method.rate(n) * gradients[n] for n, t in leaves.items()}
            with asked(method, "finish", trained=moved, fixed=fixed, own=cohort.own):
                left = method.finish(moved, fixed, cohort.own)
        upload, own = check_states(method, "finish", left, clients)
        note("finish", {f"sent {name}": t for name, t in upload.items()})
        note("finish", {f"kept {name}": t for name, t in own.items()})
        return _Seen(values, upload, own)

    def _start(self, cohort: _Cohort, *, training: bool) -> tuple[State, State]:
        with asked(self.method, "start", download=cohort.down, own=cohort.own):
            pair = self.method.start(cohort.down, cohort.own, training=training)
        return check_states(self.method, "start", pair, len(cohort.batch.labels))

    def _gradients(self, loss: Tensor, text: Tensor, leaves: State) -> State:
        """Return the gradients of the summed loss, after those of each client's text and loss."""
        names, tensors = list(leaves), list(leaves.values())

        def rows_of(verb: str, u: int, number: Tensor) -> None:
            if not number.requires_grad:
                return
            found = torch.autograd.grad(number, tensors, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is None:
                    continue
                rest = [v for v in range(len(gradient)) if v != u]
                if gradient[rest].abs().sum() > 0:
                    rule = "look at no other client of the cohort"
                    raise self.refuse(verb, rule, f"a gradient of client {u} to {name!r} of others")

        for u in range(len(loss)):
            rows_of("text", u, text[u].sum())
            rows_of("loss", u, loss[u])
        found = torch.autograd.grad(loss.sum(), tensors, allow_unused=True)
        gradients = dict(zip(names, found, strict=True))
        check_gradients(self.method, gradients)
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    @torch.no_grad()
    def _evaluate(self, cohort: _Cohort) -> None:
        """Let one client answer, with what it keeps and without."""
        method, count = self.method, cohort.batch.image.shape[1]
        self.task.text_features.clear()
        trained, fixed = self._start(cohort, training=False)
        with asked(method, "text", trained=trained, fixed=fixed):
            text = method.text(trained, fixed)
        check_text(method, text, 1)
        with asked(method, "logits", trained=trained, fixed=fixed):
            logits = method.logits(text, trained, fixed, cohort.batch.image)
        check_logits(method, logits, (1, count, len(_NAMES)))
        if furthest({"logits": {"logits": logits}}, 1) is not None:
            raise self.refuse("logits", "return finite numbers", "one that is not")

    def _merge(self, server: State, uploads: dict[int, State], round_: int) -> State:
        """Merge in several orders, and without uploads."""
        method = self.method
        names = {c: set(state) for c, state in uploads.items()}
        if len({tuple(sorted(n)) for n in names.values()}) > 1:
            shown = ", ".join(sorted({str(sorted(n)) for n in names.values()}))
            raise self.refuse("finish", "send the same tensors from every client", shown)
        images = {c: 3 + c for c in uploads}
        sent = next(iter(uploads.values()))
        order = sorted(uploads)
        before, found = _copied(server), []
        orders: tuple[list[int], ...] = ([*order], order[::-1], [*order[1:], order[0]], [])
        for some in orders:
            mine = {c: uploads[c] for c in some if sent}
            with asked(method, "merge", upload=sent, server=server):
                merged = method.merge(server, mine, {c: images[c] for c in mine}, round_)
            self._unchanged("merge", before, server)
            found.append(check_merged(method, server, merged))
            if furthest({"merge": {n: t[None] for n, t in found[-1].items()}}, 1) is not None:
                raise self.refuse("merge", "return finite numbers", "one that is not")
        for other in found[1:3]:
            for name, tensor in found[0].items():
                if not torch.equal(tensor, other[name]):
                    rule = "not depend on the order of uploads"
                    raise self.refuse("merge", rule, f"another {name!r}")
        return _copied(found[0])

    # -- what stays as it was --------------------------------------------------------------------

    def _same(self, verb: str, one: State, other: State) -> None:
        equal = set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)
        if not equal:
            raise self.refuse(verb, "give the same for the same arguments", "another state")

    def _unchanged(self, verb: str, before: State, after: State) -> None:
        for name in {*before, *after}:
            if (
                name not in before
                or name not in after
                or not torch.equal(before[name], after[name])
            ):
                raise self.refuse(verb, "leave its arguments as they are", f"another {name!r}")


def _stack(states: list[State]) -> State:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _alike(
    members: list[int], downs: Mapping[int, State], kept: Mapping[int, State]
) -> list[list[int]]:
    """Group clients whose states have the same names and shapes."""
    groups: dict[Any, list[int]] = {}
    for client in members:
        states = downs[client], kept.get(client, {})
        kind = tuple(tuple(sorted((n, tuple(t.shape)) for n, t in s.items())) for s in states)
        groups.setdefault(kind, []).append(client)
    return list(groups.values())


def _copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _rows(state: State, rows: slice) -> State:
    return {name: tensor[rows] for name, tensor in state.items()}


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Change every tensor of a batch."""
    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return replace(batch, **{n: change(t) for n, t in found.items() if t is not None})


def _batch_rows(batch: Batch, rows: slice) -> Batch:
    return _mapped(batch, lambda t: t[rows])


def _changed(state: State, u: int) -> State:
    """Change the floating point numbers of one client; integers may be places, and stay."""
    new = _copied(state)
    for tensor in new.values():
        if tensor.is_floating_point():
            tensor[u] = 1.25 * tensor[u] + 0.125
    return new


def _batch_changed(batch: Batch, u: int) -> Batch:
    image, labels = batch.image.clone(), batch.labels.clone()
    image[u], labels[u] = image[u].flip(-1), (labels[u] + 1) % len(_NAMES)
    strong = batch.strong
    if strong is not None:
        strong = strong.clone()
        strong[u] = strong[u].flip(-1)
    return replace(batch, image=image, labels=labels, strong=strong)


def _unit(image: Tensor) -> Tensor:
    unit: Tensor = image / image.norm(dim=-1, keepdim=True)
    return unit


def _near(one: Tensor, other: Tensor, *, exact: bool = False) -> bool:
    """Whether two tensors are equal, to rounding unless exactly."""
    if exact or not one.is_floating_point():
        return torch.equal(one, other)
    if not one.numel():
        return one.shape == other.shape
    # 32-bit parts of a method round coarser than a cohort of another size may
    rounding = _ROUNDING if one.dtype == torch.float64 else 1e-4
    scale = max(one.abs().max().item(), 1e-12)
    return bool((one - other).abs().max().item() <= rounding * scale + 1e-12)
