"""A federation over several ranks: each trains and asks its part, rank 0 merges and writes.

Every rank holds the frozen CLIP and the server's state, so that each makes the downloads of its own
clients. Uploads travel to rank 0, which alone merges, in the order of client numbers as one process
does, and hands what has changed of the server to all: noise is drawn once, and machines whose last
bits differ cannot drift apart. Private states lie in the run's folder, which all share: whoever
trains a client writes its file, under a name that rank 0 has announced before.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfpl.errors import Disconnected
from fastfpl.federation.exams import Exam, joined, mark
from fastfpl.federation.ranks import Ranks, parts
from fastfpl.federation.rounds import Federation
from fastfpl.federation.sampling import Call
from fastfpl.federation.server import Round
from fastfpl.federation.states import StateFiles
from fastfpl.federation.turns import InTurn
from fastfpl.methods import State
from fastfpl.training.scoring import Scores

__all__ = ["RankedFederation", "changed", "patched"]

# rows of a server's tensor that are compared at once
_ROWS = 1024
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def changed(before: State, after: State) -> State:
    """Return what must travel so that ``before`` becomes ``after``, bit for bit.

    Of a tensor of which less than half the rows differ (a pool with one row a client) these rows
    and their numbers; nothing of one that is the same; the whole of any other.
    """
    found: State = {}
    for name, tensor in after.items():
        old = before.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            found[f"whole/{name}"] = tensor
            continue
        if old is tensor or not tensor.numel():
            continue
        rows = _differ(old, tensor)
        if not len(rows):
            continue
        if tensor.ndim and 2 * len(rows) < len(tensor):
            found[f"rows/{name}"], found[f"new/{name}"] = rows, tensor[rows.to(tensor.device)]
        else:
            found[f"whole/{name}"] = tensor
    return found


def _differ(old: Tensor, new: Tensor) -> Tensor:
    """Return the numbers of the rows whose bits differ: (m,), int64."""
    count = len(new) if new.ndim else 1
    integer = _INTEGERS[new.element_size()]
    sides = [t.contiguous().reshape(count, -1).view(integer) for t in (old, new)]
    pairs = zip(sides[0].split(_ROWS), sides[1].split(_ROWS), strict=True)
    return torch.cat([(one != other).any(dim=-1) for one, other in pairs]).nonzero()[:, 0].cpu()


def patched(before: State, news: State, device: torch.device) -> State:
    """Return the state that `changed` was told of."""
    after = dict(before)
    for key, tensor in news.items():
        kind, _, name = key.partition("/")
        if kind == "whole":
            after[name] = tensor.to(device)
        elif kind == "rows":
            after[name] = before[name].clone()
            after[name][tensor.to(device)] = news[f"new/{name}"].to(device)
    return after


@dataclass
class RankedFederation(Federation):
    """A federation of which every rank plays its part.

    Attributes
    ----------
    ranks : Ranks
        Given as soon as it is prepared.
    """

    ranks: Ranks | None = None

    @property
    def _ranks(self) -> Ranks:
        assert self.ranks is not None
        return self.ranks

    # -- training --------------------------------------------------------------------------------

    def _train(self, line: dict[str, Any]) -> None:
        begin = time.perf_counter()
        ranks, before = self._ranks, self._ranks.sent + self._ranks.received
        call = self.sampling.call(self.now.number)
        mine = call.of(set(self._parts(call)[ranks.rank]))
        trained = self.method.evaluates_download == "trained"
        # a thousand clients' worth does not fit into memory
        uploads = StateFiles(device=self._device, beside=self.folder) if ranks.first else None
        start = None
        if uploads is not None:
            reserved = self.clients.reserve(call.selected)
            start = {"states": reserved, "scratch": uploads.place.name}
        said = ranks.say(start)
        assert said is not None
        self.clients.promise({str(c): said["states"][str(c)] for c in mine.selected})
        if uploads is None:
            assert self.folder is not None
            # below rank 0's, which removes it however the round ends
            place = self.folder / said["scratch"] / f"rank-{ranks.rank}"
            try:
                self._contribute(mine, place, trained)
                self._go_on(trained)
            except BaseException as error:
                self.clients.discard()
                shutil.rmtree(place, ignore_errors=True)
                if isinstance(error, Disconnected):
                    # rank 0 has gone, and looked after what there was until then
                    with contextlib.suppress(OSError):
                        place.parent.rmdir()
                raise
            return
        server = self.now.server
        where: dict[str, Any] = {"states": self._gather(call, mine, uploads, line, begin)}
        if trained:
            where["downloads"] = self.downloads.told(call.selected)
        ranks.say(where)
        ranks.spread(changed(server, self.now.server))
        line["ranks"]["bytes"] = ranks.sent + ranks.received - before

    def _parts(self, call: Call) -> list[list[int]]:
        """Part the clients of a round among ranks, by their images."""
        if isinstance(self.order, InTurn):  # each waits for the one before
            return [list(call.selected), *([] for _ in range(1, self._ranks.size))]
        return parts({c: len(self.trainer.images[c]) for c in call.selected}, self._ranks.size)

    def _gather(
        self, call: Call, mine: Call, uploads: StateFiles, line: dict[str, Any], begin: float
    ) -> dict[str, Any]:
        """On rank 0: train its part, take in what the others have trained, and merge.

        Returns where the states of the round's clients lie.
        """
        ranks = self._ranks
        played = self._play(mine, uploads, self.downloads)
        told = self.clients.told(mine.selected)
        seconds, images = [time.perf_counter() - begin], [played.images]
        for rank in range(1, ranks.size):
            report = ranks.hear(rank)
            played.losses |= {int(c): loss for c, loss in report["losses"].items()}
            for name in ("images", "bytes_up", "bytes_down"):
                setattr(played, name, getattr(played, name) + report[name])
            self.clients.adopt(report["states"])
            told |= report["states"]
            for key, state in ranks.take(rank):
                side, _, client = key.partition("/")
                if int(client) not in call.selected or side not in ("up", "down"):
                    raise Disconnected(
                        f"fastfpl.run: rank {rank} must send what its clients trained; got {key!r}"
                    )
                (uploads if side == "up" else self.downloads).put(int(client), state)
            seconds.append(report["seconds"])
            images.append(report["images"])
        self._merge(call, played, uploads, line)
        self._note(call, played, line, begin)
        line["ranks"] = {"images": images, "seconds": seconds}
        return told

    def _contribute(self, mine: Call, place: Path, trained: bool) -> None:
        """On another rank: train its part, and send what came of it."""
        ranks = self._ranks
        sent = StateFiles(place / "up")
        downs = StateFiles(place / "down")
        begin = time.perf_counter()
        played = self._play(mine, sent, downs)
        states = self.clients.told(mine.selected)
        ranks.tell(
            {
                "losses": {str(c): loss for c, loss in played.losses.items()},
                "images": played.images,
                "bytes_up": played.bytes_up,
                "bytes_down": played.bytes_down,
                "states": states,
                "seconds": time.perf_counter() - begin,
            }
        )

        def found() -> Iterator[tuple[str, Mapping[str, Tensor]]]:
            for client in mine.selected:
                if client in sent:
                    yield f"up/{client}", sent[client]
                if trained and client in downs:
                    yield f"down/{client}", downs[client]

        ranks.give(found())

    def _go_on(self, trained: bool) -> None:
        """On another rank: take up where clients' states lie, and the merged server."""
        where: dict[str, Any] = self._ranks.say({})
        self.clients.adopt(where["states"])
        self.clients.leave()
        if trained:
            self.downloads.adopt(where["downloads"])
        server = patched(self.now.server, self._ranks.spread(None), self._device)
        self.now = Round(self.now.number + 1, server, {})

    # -- evaluation ------------------------------------------------------------------------------

    def _evaluate(self, line: dict[str, Any]) -> None:
        ranks = self._ranks
        asked, size = list(self.examiner.asked), ranks.size
        # a personal model also encodes its own texts
        beside = len(self.method.task.classes) if self.method.personal else 0
        weights = {c: beside + sum(len(e.images[c]) for e in self.examiner.exams) for c in asked}
        mine = parts(weights, size)[ranks.rank]
        places: list[int] | None = None
        if self.newcomers is not None:
            adapted = self.newcomers.adapted
            places = parts(
                {p: len(adapted.images[p]) for p in range(len(self.newcomers.domains))}, size
            )[ranks.rank]
        keeps = self.method.tune_epochs > 0 or self.newcomers is not None
        beside_me = StateFiles(beside=self.folder) if ranks.first and keeps else None
        scratch = ranks.say(None if beside_me is None else beside_me.place.name)
        if ranks.first:
            results = self._ask(mine, places, self.tuned.put)
            self._mark(line, list(self._joined(results, mine, places, asked)))
            for rank in range(1, size) if keeps else ():
                for client, state in ranks.take(rank):
                    self.tuned.put(int(client), state)
            return
        assert self.folder is not None
        kept = StateFiles(None if scratch is None else self.folder / scratch / f"rank-{ranks.rank}")
        results = self._ask(mine, places, kept.put)
        for exam, scores, clients in self._each(results, mine, places):
            ranks.give([("marks", _table(exam, scores, clients))])
        if keeps:
            ranks.give((str(client), kept[client]) for client in kept)

    def _each(
        self, results: list[list[Scores]], mine: Sequence[int], places: Sequence[int] | None
    ) -> Iterator[tuple[Exam, list[Scores], Sequence[int]]]:
        """Yield every exam with the scores of those who were asked here, and who they are."""
        late = 0 if self.newcomers is None else len(self.newcomers.exams)
        for n, (exam, scores) in enumerate(zip(self.exams, results, strict=True)):
            yield exam, scores, (places or []) if n < late else mine

    def _joined(
        self,
        results: list[list[Scores]],
        mine: Sequence[int],
        places: Sequence[int] | None,
        asked: Sequence[int],
    ) -> Iterator[dict[str, Any]]:
        """On rank 0: yield the marks of every exam, in the order that one process has."""
        tables: list[list[State]] = []
        for exam, scores, clients in self._each(results, mine, places):
            tables.append([_table(exam, scores, clients)])
        for rank in range(1, self._ranks.size):
            for mine_too in tables:
                mine_too += [state for _, state in self._ranks.take(rank)]
        late = 0 if self.newcomers is None else len(self.newcomers.exams)
        for n, (exam, parted) in enumerate(zip(self.exams, tables, strict=True)):
            found: dict[int, dict[str, Any]] = {}
            for state in parted:
                found |= _marks(exam, state)
            everyone = range(len(exam.images)) if n < late else asked
            yield joined([found[client] for client in everyone], exam.domains)


def _table(exam: Exam, scores: Sequence[Scores], clients: Sequence[int]) -> State:
    """Write clients' marks of an exam as tensors; NaN where there is none."""
    rows = []
    for one in scores:
        found = mark(one, exam.domains)
        values = (found["accuracy"], found["macro_f1"])
        values += tuple(found["domains"].get(name) for name in exam.domains)
        rows.append([float("nan") if value is None else value for value in values])
    return {
        "clients": torch.tensor(list(clients), dtype=torch.int64),
        "values": torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 2 + len(exam.domains)),
    }


def _marks(exam: Exam, state: State) -> dict[int, dict[str, Any]]:
    """Read what `_table` has written."""
    found = {}
    for client, values in zip(state["clients"].tolist(), state["values"].tolist(), strict=True):
        accuracy, f1, *domains = (None if value != value else value for value in values)
        found[client] = {
            "accuracy": accuracy,
            "macro_f1": f1,
            "domains": {
                name: value
                for name, value in zip(exam.domains, domains, strict=True)
                if value is not None
            },
        }
    return found
