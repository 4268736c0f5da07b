"""A whole federation on one machine, of real processes on loopback: started, played, taken down."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfpl import system
from fastfpl.config import Settings
from fastfpl.data import scheme_of
from fastfpl.errors import Damaged, InputError, cut
from fastfpl.federation import Result
from fastfpl.federation.experiment import refuse_held
from fastfpl.federation.preparation import OWN
from fastfpl.files import on_disk, write_text
from fastfpl.flower.apps import flower_version
from fastfpl.flower.folder import write_app
from fastfpl.flower.keys import CA, SERVER, SERVER_KEY, check_keys, client_key, write_keys
from fastfpl.flower.node import environment, tool, warm_commands
from fastfpl.flower.own import agree_on_classes, own_dataset, own_plan
from fastfpl.flower.preparation import expected_clients, rehearsed
from fastfpl.flower.rules import Rules
from fastfpl.flower.status import STATUS, read_status
from fastfpl.training.preparation import choose_device

__all__ = ["Lab", "standing", "up"]

_HOST = "127.0.0.1"
_STARTS = 90.0  # seconds for a process to listen, on a machine that is busy
_LOOKS = 15.0  # seconds between two questions to the SuperLink, each a process of its own


class Lab:
    """A SuperLink and SuperNodes on loopback, which play one run after the other.

        with standing(Lab(Path("runs/lab"), clients=2)) as lab:
            for settings in several:
                lab.play(settings, rules, Path("runs") / settings.method)

    Parameters
    ----------
    folder : Path
        Of logs, of Flower's own files and of what clients keep.
    clients : int
    port : int, optional
        Of the SuperLink, free ones of the system if left out; nodes take those after it.
    secure : bool
        With TLS, and only nodes with a registered key.
    keys : Path, optional
        Folder of certificates and keys, made below ``folder`` if left out.
    node : mapping, optional
        More of every node's configuration.
    cache : Path, optional
        Below which every client has its feature cache; below ``folder`` if left out.
    own : mapping from name to str, optional
        Clients by name and where the images of each lie, in their order.
    """

    def __init__(
        self,
        folder: Path,
        clients: int,
        *,
        port: int | None = None,
        secure: bool = False,
        keys: Path | None = None,
        node: Mapping[str, Any] | None = None,
        cache: Path | None = None,
        own: Mapping[str, str] | None = None,
    ) -> None:
        flower_version()
        self._environment = environment()
        self._warm = contextlib.ExitStack()
        self._own = [{"data": data, "name": name} for name, data in (own or {}).items()]
        self.folder = folder.absolute()
        self.clients = clients
        self._secure = secure or keys is not None
        self._keys = self.folder / "keys" if keys is None else keys.absolute()
        self._node = dict(node or {})
        self._cache = (cache or self.folder / "cache").absolute()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        count = clients + 1
        self._ports = _free(count) if port is None else list(range(port, port + count))
        if port is not None:
            for one in self._ports:
                _refuse_taken(one)
        if keys is not None:
            check_keys(keys, clients)

    @property
    def address(self) -> str:
        """Where the SuperLink listens."""
        return f"{_HOST}:{self._ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """What its processes are started with."""
        return {**self._environment, "FLWR_HOME": str(self.folder / "home")}

    def start(self) -> None:
        """Start the SuperLink, then a SuperNode for every client."""
        self._environment = self._warm.enter_context(warm_commands())
        home = self.folder / "home"
        with on_disk("fastfpl.flower", "the lab's folder", self.folder, "or name another out"):
            for part in (home, self.folder / "logs", self._cache):
                part.mkdir(parents=True, exist_ok=True)
        if self._secure and not self._keys.exists():
            write_keys(self._keys, [_HOST, "localhost"], self.clients)
        trust = (
            f"root-certificates = {json.dumps(str(self._keys / CA))}"
            if self._secure
            else "insecure = true"
        )
        text = f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "{self.address}"\n'
        write_text(home / "config.toml", text + trust + "\n")
        # of nodes and runs that are gone, and of keys that are registered anew
        for old in self.folder.glob("superlink.db*"):
            old.unlink()
        link = [tool("flower-superlink"), "--host", _HOST, "--port", str(self._ports[0])]
        link += ["--database", str(self.folder / "superlink.db")]
        link += ["--disable-runtime-dependency-installation"]
        if self._secure:
            link += ["--ssl-ca-certfile", str(self._keys / CA)]
            link += ["--ssl-certfile", str(self._keys / SERVER)]
            link += ["--ssl-keyfile", str(self._keys / SERVER_KEY), "--enable-supernode-auth"]
        else:
            link += ["--insecure"]
        self._start("superlink", link)
        self._listens("superlink", self._ports[0])
        if self._secure:
            for client in range(self.clients):
                public = str(client_key(self._keys, client)) + ".pub"
                self.flwr("supernode", "register", public, "lab", "--name", f"client-{client}")
        for client in range(self.clients):
            self.start_node(client)

    def start_node(self, client: int) -> None:
        """Start the SuperNode of a client."""
        own = {
            "client": client,
            "state-dir": str(self.folder / "clients" / f"site-{client}"),
            "cache": str(self._cache / f"site-{client}"),
            **self._node,
            **(self._own[client] if self._own else {}),
        }
        text = " ".join(
            f"{key}={json.dumps(value) if isinstance(value, str) else value}"
            for key, value in own.items()
        )
        node = [tool("flower-supernode"), "--superlink", self.address, "--host", _HOST]
        node += ["--port", str(self._ports[1 + client]), "--node-config", text]
        if self._secure:
            node += ["--root-certificates", str(self._keys / CA)]
            node += ["--auth-supernode-private-key", str(client_key(self._keys, client))]
        else:
            node += ["--insecure"]
        self._start(f"client-{client}", node)

    def kill(self, name: str) -> None:
        """Kill a process and all that it started, without a word."""
        process = self._running.pop(name)
        system.end_tree(process, kill=True)
        process.wait()

    def flwr(self, *arguments: str) -> Any:
        """Ask Flower's own command line, and return the JSON that it answers."""
        command = [tool("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        # what comes before the JSON is not ours to read
        begin = done.stdout.find("{")
        try:
            answer = json.loads(done.stdout[begin:])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success", False):
            said = answer.get("error-message") or done.stderr or done.stdout
            raise InputError(
                f"fastfpl.flower: {shlex.join(command[1:3])} must succeed at {self.address}; got "
                f"{cut(' '.join(str(said).split()), 600)}; see {self.folder / 'logs'}"
            )
        return answer

    def play(
        self,
        settings: Settings,
        rules: Rules,
        out: Path,
        *,
        resume: bool = False,
        track: str = "",
        observer: Callable[[str, int, int], None] | None = None,
    ) -> Result:
        """Play a run by the processes that stand, and wait for its end.

        Parameters
        ----------
        settings : Settings
            Of as many clients as stand.
        rules : Rules
        out : Path
            Folder of the results.
        resume : bool
        track : str
            Trackers that the server tells, separated by commas (`fastfpl.tracking`).
        observer : callable, optional
            ``observer(phase, rounds done, rounds)`` is told of what goes on.
        """
        refuse_held(out, resume)
        rehearsed(settings, rules)
        clients = expected_clients(settings)
        if clients != self.clients:
            raise InputError(
                f"fastfpl.flower: clients must be the {self.clients} that stand; got {clients}"
            )
        out, app = out.absolute(), self.folder / "app"
        if app.exists():
            shutil.rmtree(app)
        write_app(app, settings.method, settings.model_dump(), rules.model_dump(), str(out), track)
        stamp = _stamp(out)
        return self._watch(self.submit(app, resume), out, stamp, observer)

    def submit(self, app: Path, resume: bool = False) -> str:
        """Hand in a run; return its number."""
        how = f"resume={'true' if resume else 'false'}"
        return str(self.flwr("run", str(app), "lab", "--run-config", how)["run-id"])

    def status(self, run: str) -> str:
        """Return what the SuperLink says of a run."""
        found = self.flwr("ls", "lab", "--run-id", run)["runs"]
        return str(found[0]["status"]) if found else "unknown"

    def dead(self) -> list[str]:
        """Return which processes have ended, with the end of their logs."""
        return [
            f"{name} ended with {process.returncode}: {self._tail(name)}"
            for name, process in self._running.items()
            if process.poll() is not None
        ]

    def stop(self) -> None:
        """Take everything down: nodes first, then the SuperLink."""
        names = sorted(self._running, key=lambda name: name == "superlink")
        for name in names:
            system.end_tree(self._running[name], kill=False)
        end = time.monotonic() + 10
        for name in names:
            process = self._running.pop(name)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            system.end_tree(process, kill=True)
            process.wait()
        self._warm.close()

    def _start(self, name: str, command: Sequence[str]) -> None:
        path = self.folder / "logs" / f"{name}.log"
        with path.open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def _listens(self, name: str, port: int) -> None:
        end = time.monotonic() + _STARTS
        while time.monotonic() < end and self._running[name].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((_HOST, port), 1):
                return
            time.sleep(0.2)
        raise InputError(
            f"fastfpl.flower: {name} must listen on port {port} within {_STARTS:g} s; got "
            f"{self._tail(name)}; see {self.folder / 'logs'}"
        )

    def _watch(
        self,
        run: str,
        out: Path,
        stamp: float,
        observer: Callable[[str, int, int], None] | None,
    ) -> Result:
        """Wait for the end of a run."""
        looked = time.monotonic()
        while True:
            status = _status(out) if _stamp(out) > stamp else {}
            phase = status.get("phase")
            if phase and observer is not None:
                observer(str(phase), int(status["rounds_done"]), int(status["rounds"]))
            if phase == "finished":
                return Result.load(out)
            if phase == "stopped":
                raise InputError(str(status.get("why")))
            dead = [text for text in self.dead() if text.startswith("superlink")]
            if dead:
                raise InputError(f"fastfpl.flower: the SuperLink must stay; got {dead[0]}")
            if time.monotonic() - looked > _LOOKS:
                looked = time.monotonic()
                found = self.status(run)
                ended = _stamp(out) > stamp and _status(out).get("phase") in ("finished", "stopped")
                if found.startswith("finished") and not ended:
                    tail = self._tail("superlink")
                    raise InputError(
                        f"fastfpl.flower: the ServerApp must end with a result; got {found}: "
                        f"{tail}; see {self.folder / 'logs'}"
                    )
            time.sleep(0.3)

    def _tail(self, name: str) -> str:
        path = self.folder / "logs" / f"{name}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return cut(" ".join(" ".join(lines[-12:]).split()), 600) or "nothing"


@contextlib.contextmanager
def standing(lab: Lab) -> Iterator[Lab]:
    """Have a lab stand, and take it down however this ends, by a signal too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if main else None
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        if main:
            signal.signal(signal.SIGTERM, before)


def up(
    settings: Settings,
    rules: Rules,
    out: Path,
    *,
    resume: bool = False,
    port: int | None = None,
    secure: bool = False,
    keys: Path | None = None,
    node: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    track: str = "",
    own: Mapping[str, str] | None = None,
    observer: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Play a run by a SuperLink and one SuperNode a client on loopback, and take them down.

    Parameters
    ----------
    settings : Settings
    rules : Rules
    out : Path
        Folder of the results; logs and what clients keep lie in ``out/flower``.
    resume : bool
    port, secure, keys, node, cache
        See `Lab`.
    track : str
        Trackers that the server tells, separated by commas (`fastfpl.tracking`).
    own : mapping from name to str, optional
        With ``dataset="own"``: every client's name, and where its images lie, as ``folder:PATH``.
    observer : callable, optional
        ``observer(phase, rounds done, rounds)`` is told of what goes on.

    Returns
    -------
    Result
    """
    refuse_held(out, resume)
    rehearsed(settings, rules)
    choose_device(settings.device)
    folder = out.absolute() / "flower"
    clients = expected_clients(settings)
    places = _places(settings, clients, own or {})
    lab = Lab(
        folder, clients, port=port, secure=secure, keys=keys, node=node, cache=cache, own=places
    )
    with standing(lab):
        return lab.play(settings, rules, out, resume=resume, track=track, observer=observer)


def _places(settings: Settings, clients: int, own: Mapping[str, str]) -> dict[str, str]:
    """Look at clients' own images before a process is started: (name to absolute place)."""
    if (settings.dataset == OWN) != bool(own) or len(own) not in (0, clients):
        raise InputError(
            f"fastfpl.flower: own must name the images of every client with dataset='own', and of "
            f"no other; got {len(own)} for {clients} clients of dataset={settings.dataset!r}: "
            "--own NAME=PATH"
        )
    places = {}
    for name, data in own.items():
        if '"' in name + data:  # where Flower ends a text of a node's configuration
            raise InputError(
                f"fastfpl.flower: own must hold no double quotation mark; got {name}={data}"
            )
        scheme = scheme_of(data)
        path = data if scheme is None else data.partition(":")[2]
        there = Path(path).exists()  # of hf: it may be a name of the hub
        places[name] = f"{scheme or 'folder'}:{Path(path).absolute() if there else path}"
    sets = {name: own_dataset(settings, data) for name, data in places.items()}
    if sets:
        agree_on_classes(sets)
    for client, dataset in enumerate(sets.values()):
        own_plan(settings, client, dataset)
    return places


def _status(out: Path) -> dict[str, Any]:
    try:
        return read_status(out)
    except Damaged:
        return {}


def _stamp(out: Path) -> float:
    try:
        return (out / STATUS).stat().st_mtime
    except OSError:
        return -1.0


def _free(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind((_HOST, 0))
            ports.append(int(one.getsockname()[1]))
    return ports


def _refuse_taken(port: int) -> None:
    try:
        with socket.socket() as one:
            # elsewhere it would let two processes share the port
            if not system.WINDOWS:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((_HOST, port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"fastfpl.flower: port must be free on {_HOST}; got {port}: {error}; name another, or "
            "leave it out"
        ) from None
