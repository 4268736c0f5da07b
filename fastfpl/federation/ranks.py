"""Processes that play one run together, as torchrun starts them: who they are, and what travels.

Everything travels through host memory over gloo, also of runs on cards: what goes from rank to rank
is what a round writes to disk (prompts, private states) or a few numbers. A letter is JSON or
safetensors in a tensor of bytes; no pickle is written or read.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import heapq
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastfpl.errors import Disconnected, FastfplError, InputError, cut, shown
from fastfpl.methods import State

__all__ = ["Ranks", "elsewhere", "parts", "quietly", "ranks_asked", "together"]

#: Seconds that a rank waits for another one at most, unless the variable says otherwise.
TIMEOUT = "FASTFPL_RANKS_TIMEOUT"
_WAITS = 1800.0
# to find each other: torchrun starts all ranks at once
_STARTS = 300.0
# bytes of states that travel in one letter, about
_LETTER = 1 << 24
# seconds for the sentence of a rank that failed to arrive beside the end of its connection
_EXPLAINS = 1.0
_ON = "go on with the same command and --resume, with any number of ranks"


def parts(weights: Mapping[int, int], size: int) -> list[list[int]]:
    """Part clients among ranks so that all have about as much to do.

    Parameters
    ----------
    weights : mapping from client to int
        Images of each, or what else its work is measured by.
    size : int
        Number of ranks.

    Returns
    -------
    list of list of int
        Clients of each rank, ascending; some have none where there are fewer clients than ranks.
    """
    found: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, 0, rank) for rank in range(size)]
    # the largest first, each to who has least; ties go by number, so that all ranks say the same
    for client in sorted(weights, key=lambda c: (-weights[c], c)):
        load_, count, rank = heapq.heappop(loads)
        found[rank].append(client)
        heapq.heappush(loads, (load_ + weights[client], count + 1, rank))
    return [sorted(part) for part in found]


def ranks_asked() -> int:
    """Say how many ranks the environment names: 1 unless torchrun or its like has started several.

    Raises
    ------
    InputError
        If the variables are no numbers that go together.
    """
    return _place()[1]


def elsewhere() -> bool:
    """Whether this process is one of several ranks, and not the first: it says and writes nothing.

    What is no number is said by whoever starts the ranks.
    """
    try:
        rank, size, _ = _place()
    except InputError:
        return False
    return size > 1 and rank > 0


def _place() -> tuple[int, int, int]:
    """Read rank, number of ranks and rank on this machine, as torchrun names them."""
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if said["WORLD_SIZE"] is None or said["RANK"] is None:
        return 0, 1, 0
    numbers = []
    for name, text in said.items():
        text = said["RANK"] if text is None else text
        if text is None or not text.isdecimal() or len(text) > 6:
            raise InputError(f"fastfpl.run: {name} must be a whole number; got {shown(text)}")
        numbers.append(int(text))
    rank, size, local = numbers
    if size < 1 or rank >= size:
        raise InputError(
            f"fastfpl.run: RANK must be less than WORLD_SIZE; got RANK={rank} and "
            f"WORLD_SIZE={size}; start ranks by torchrun"
        )
    return rank, size, local


def _patience() -> float:
    text = os.environ.get(TIMEOUT)
    if text is None:
        return _WAITS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 1e6:
        raise InputError(
            f"fastfpl.run: {TIMEOUT} must be seconds from 1 to 1000000; got {shown(text)}"
        )
    return seconds


class Ranks:
    """The processes of one run, seen from one of them.

    Attributes
    ----------
    rank, size : int
        Which one this is, of how many; the first one is 0 and holds the run's folder.
    local : int
        Which one of its machine.
    sent : int
        Bytes that this rank has sent or handed to all.
    received : int
        Bytes that came to it.

    Parameters
    ----------
    group : int
        How many groups of this process have failed before.
    """

    def __init__(self, group: int = 0) -> None:
        self.rank, self.size, self.local = _place()
        self.sent = self.received = 0
        self._patience = _patience()
        self._stopped = ""
        start = timedelta(seconds=min(_STARTS, self._patience))
        try:
            self._store = PrefixStore(f"fastfpl/{group}", _met(start))
            self._mine = not dist.is_initialized()
            if self._mine:
                dist.init_process_group(
                    "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=start
                )
            wait = timedelta(seconds=self._patience)
            self._group: Any = dist.new_group(backend="gloo", timeout=wait)
        except (RuntimeError, ValueError) as error:  # torch's own errors are of the first kind
            where = ":".join(os.environ.get(n, "?") for n in ("MASTER_ADDR", "MASTER_PORT"))
            cure = "start all ranks at once by torchrun, with the same address"
            if "EADDRINUSE" in str(error) or "in use" in str(error):
                cure = "the port is in use: name another one (--master-port, MASTER_PORT)"
            raise Disconnected(
                f"fastfpl.run: {self.size} ranks must find each other at {cut(where)}; got "
                f"{_first_line(error)}; {cure}"
            ) from None

    @property
    def first(self) -> bool:
        """Whether this is the rank that holds the folder, merges, writes and speaks."""
        return self.rank == 0

    # -- letters -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _over(self, rank: int | None) -> Iterator[None]:
        """Turn the end of a connection into a sentence."""
        if self._group is None:
            raise Disconnected("fastfpl.run: ranks must be together; got a run of them that failed")
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, FastfplError):
                raise
            raise self._gone(rank, error) from None

    def _gone(self, rank: int | None, error: RuntimeError) -> FastfplError:
        """Say why a rank does not answer: its own sentence, if it has left one."""
        who = "another rank" if rank is None else f"rank {rank}"
        if "imed out" in str(error):
            return Disconnected(
                f"fastfpl.run: every rank must answer within {self._patience:g} s ({TIMEOUT}); got "
                f"nothing from {who}; the rounds that ended are kept, {_ON}"
            )
        return self._told() or Disconnected(
            f"fastfpl.run: every rank must live as long as the run; got the end of {who}; the "
            f"rounds that ended are kept, {_ON}"
        )

    def _told(self, wait: float = _EXPLAINS) -> FastfplError | None:
        """Return the sentence of a rank that failed, if there is one or comes within seconds."""
        if not self.first:
            return None
        until = time.monotonic() + wait
        while True:
            for rank in range(1, self.size):
                with contextlib.suppress(RuntimeError):
                    if self._store.check([f"failed/{rank}"]):
                        text = self._store.get(f"failed/{rank}").decode(errors="replace")
                        return InputError(f"{text} (said by rank {rank})")
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)

    def _send(self, content: bytes, rank: int) -> None:
        with self._over(rank):
            dist.send(torch.tensor([len(content)]), rank, group=self._group)
            if content:
                dist.send(_bytes(content), rank, group=self._group)
        self.sent += len(content)

    def _receive(self, rank: int) -> bytes:
        with self._over(rank):
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, rank, group=self._group)
            content = torch.empty(int(length), dtype=torch.uint8)
            if len(content):
                dist.recv(content, rank, group=self._group)
        self.received += len(content)
        return content.numpy().tobytes()

    def _to_all(self, content: bytes | None) -> bytes:
        """Hand what rank 0 has to every rank."""
        with self._over(None if self.first else 0):
            length = torch.tensor([0 if content is None else len(content)])
            dist.broadcast(length, 0, group=self._group)
            if content is None or not self.first:
                letter = torch.empty(int(length), dtype=torch.uint8)
            else:
                letter = _bytes(content)
            if len(letter):
                dist.broadcast(letter, 0, group=self._group)
        if self.first and content is not None:
            self.sent += len(content) * (self.size - 1)
            return content
        self.received += len(letter)
        return letter.numpy().tobytes()

    # -- what is said --------------------------------------------------------------------------

    def say(self, value: Any) -> Any:
        """Return rank 0's value, JSON, on every rank; what the others hand in does not count."""
        mine = json.dumps(value).encode() if self.first else None
        said = self._to_all(mine)
        return value if self.first else json.loads(said)

    def gathered(self, value: Any) -> list[Any]:
        """Return every rank's value, JSON, on rank 0; an empty list on the others."""
        if not self.first:
            self._send(json.dumps(value).encode(), 0)
            return []
        return [value, *(json.loads(self._receive(rank)) for rank in range(1, self.size))]

    def tell(self, value: Any) -> None:
        """Send a value, JSON, to rank 0."""
        self._send(json.dumps(value).encode(), 0)

    def hear(self, rank: int) -> Any:
        """Return what a rank tells rank 0."""
        return json.loads(self._receive(rank))

    # -- tensors -------------------------------------------------------------------------------

    def give(self, states: Iterable[tuple[str, Mapping[str, torch.Tensor]]]) -> None:
        """Send named states to rank 0, some MiB a letter."""
        letter: State = {}
        for key, state in states:
            letter |= {f"{key}/{name}": _host(state[name]) for name in state}
            if sum(tensor.nbytes for tensor in letter.values()) >= _LETTER:
                self._send(save(letter), 0)
                letter = {}
        if letter:
            self._send(save(letter), 0)
        self._send(b"", 0)

    def take(self, rank: int) -> Iterator[tuple[str, State]]:
        """Yield the named states that a rank gives, on the host; empty ones do not travel."""
        while content := self._receive(rank):
            states: dict[str, State] = {}
            for path, tensor in self._opened(content, rank).items():
                key, _, name = path.rpartition("/")
                states.setdefault(key, {})[name] = tensor
            yield from states.items()

    def spread(self, state: State | None) -> State:
        """Return rank 0's state on every rank, on the host of the others."""
        if self.first:
            assert state is not None
            self._to_all(save({name: _host(t) for name, t in state.items()}))
            return state
        return self._opened(self._to_all(None), 0)

    def _opened(self, content: bytes, rank: int) -> State:
        try:
            found: State = load(content)
        except (SafetensorError, KeyError) as error:
            raise Disconnected(
                f"fastfpl.run: rank {rank} must send tensors; got {cut(str(error))}"
            ) from None
        return found

    # -- what must be equal ----------------------------------------------------------------------

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Refuse ranks whose facts, JSON, differ in anything.

        Raises
        ------
        InputError
            On rank 0, with the digests of both and what differs; the others find it gone.
        """
        text = json.dumps(facts, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        heard = self.gathered({"digest": digest, "facts": json.loads(text)})
        for rank, other in enumerate(heard):
            if other["digest"] == digest:
                continue
            theirs = other["facts"]
            named = [k for k in sorted({*facts, *theirs}) if facts.get(k) != theirs.get(k)]
            differ = ", ".join(
                f"{k} {shown(facts.get(k))} and {shown(theirs.get(k))}" for k in named[:5]
            )
            raise InputError(
                f"fastfpl.run: every rank must have the same {what}; got {digest} of rank 0 and "
                f"{other['digest']} of rank {rank}: {differ}"
            )
        self.say(None)

    def least(self, value: int) -> int:
        """Return the least of all ranks' values."""
        held = self.gathered(value)
        return int(self.say(min(held) if held else value))

    # -- beginning and end -------------------------------------------------------------------------

    @contextlib.contextmanager
    def playing(self) -> Iterator[None]:
        """Leave no other rank without an answer, however what is inside ends.

        A rank that fails leaves its sentence where rank 0 finds it and closes its connections, at
        which everybody's next letter fails. When torchrun ends rank 0 because another rank died,
        that is a sentence too.
        """
        with self._ended_by_signal():
            try:
                yield
            except BaseException as error:
                self._leave(error)
                if self._stopped:
                    raise (self._told() or self._ended()) from None
                raise

    def _ended(self) -> Disconnected:
        return Disconnected(
            f"fastfpl.run: every rank must live as long as the run; got {self._stopped}, as "
            f"torchrun sends it when another rank has died; the rounds that ended are kept, {_ON}"
        )

    @contextlib.contextmanager
    def _ended_by_signal(self) -> Iterator[None]:
        """Let rank 0 say a sentence at SIGTERM."""
        usual = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        here = threading.current_thread() is threading.main_thread()
        if not (self.first and usual and here):
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            self._stopped = "SIGTERM"
            raise self._ended()

        signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _leave(self, error: BaseException) -> None:
        if self._group is None:
            return
        if not self.first and not isinstance(error, Disconnected):
            text = str(error) if isinstance(error, FastfplError) else _first_line(error)
            with contextlib.suppress(RuntimeError):
                self._store.set(f"failed/{self.rank}", text)
        self.close()

    @property
    def closed(self) -> bool:
        """Whether a run has failed."""
        return self._group is None

    def close(self) -> None:
        """Let go of the other ranks; nothing can be sent after it."""
        self._group = None
        if self._mine and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        gc.collect()  # connections end with the last name of their group


# one group a process: runs that follow each other go on with it, until one fails
_group: Ranks | None = None
_groups = 0
# where ranks meet; one a process, since rank 0 may be who listens
_meeting: Any = None


def _met(wait: timedelta) -> Any:
    """Return where ranks meet.

    Whoever listens at the address and is no store of torch's keeps a rank waiting without end.
    """
    global _meeting
    if _meeting is not None:
        return _meeting
    found: list[Any] = []

    def meet() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=wait))[0])
        except Exception as error:
            found.append(error)

    seeking = threading.Thread(target=meet, daemon=True)
    seeking.start()
    # a little more: it has a wait of its own, and says better why
    seeking.join(wait.total_seconds() + 1)
    if not found:
        raise RuntimeError("nobody there who answers")
    if isinstance(found[0], Exception):
        raise found[0]
    _meeting = found[0]
    return _meeting


@contextlib.contextmanager
def together() -> Iterator[Ranks | None]:
    """Meet the other ranks that torchrun has started for one run; None where there are none.

    Raises
    ------
    Disconnected
        If they do not meet, or one of them is gone before the end.
    FastfplError
        On rank 0 also the sentence of any other rank that failed.
    """
    global _group, _groups
    if ranks_asked() == 1:
        yield None
        return
    if _group is None or _group.closed:
        _group, _groups = Ranks(_groups), _groups + 1
    with _group.playing():
        yield _group


@contextlib.contextmanager
def quietly(linger: float = 20.0) -> Iterator[None]:
    """Let a process that is not rank 0 say nothing, nor of a mistake that rank 0 says.

    One that fails stays for some seconds: torchrun ends rank 0 as soon as another one is gone,
    and rank 0 has a sentence to say. Errors that are no user's show as they do anywhere.
    """
    if not elsewhere():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        except SystemExit as end:
            if end.code not in (0, None) and "TORCHELASTIC_RUN_ID" in os.environ:
                time.sleep(linger)
            raise


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return cut(f"{type(error).__name__}: {text}" if text else type(error).__name__, 300)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
