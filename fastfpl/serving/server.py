"""A server of the application on a socket of this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import socket
from collections.abc import Callable

from fastfpl.errors import InputError, Missing, cut
from fastfpl.serving.answers import Answerer
from fastfpl.trained import Model

__all__ = ["LOOPBACK", "check_library", "hosts_of", "is_loopback", "listen", "serve"]

#: Where it listens unless another host is named.
LOOPBACK = "127.0.0.1"
# requests at once; more are told to come later
_AT_ONCE = 32


def check_library() -> None:
    """Refuse to begin without the libraries of the extra.

    Raises
    ------
    Missing
        With the command that gets them.
    """
    lacking = [n for n in ("fastapi", "uvicorn") if importlib.util.find_spec(n) is None]
    if lacking:
        raise Missing(
            f"fastfpl.serve: {' and '.join(lacking)} must be installed; got none; "
            'run: pip install "fastfpl[serve]"'
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Open the socket; of port 0 the system chooses one.

    Raises
    ------
    InputError
        If the port is taken, or the host is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, number, _, address = found[0]
        made = socket.socket(family, kind, number)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(128)
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"fastfpl.serve: host and port must be free and of this machine; got {cut(host)}:"
            f"{port}: {getattr(error, 'strerror', None) or error}; name another --port, or --port 0"
        ) from None
    return made


def hosts_of(host: str) -> list[str]:
    """Return the names by which a host may be asked for; all of one that others reach."""
    # starlette ends a host at its first colon, and no site's name begins with a bracket
    own = ["localhost", "127.0.0.1", "["]
    return [*own, host] if is_loopback(host) else ["*"]


def serve(
    model: Model,
    at: socket.socket,
    *,
    host: str = LOOPBACK,
    max_upload: int,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer until the process is told to stop.

    Parameters
    ----------
    model : Model
    at : socket
        See `listen`; closed in the end.
    host : str
        As it was asked for.
    max_upload : int
        Bytes of an image at most.
    ready : callable
        Told once it answers, and ends by Ctrl-C or SIGTERM.
    """
    check_library()
    import uvicorn

    from fastfpl.serving.app import make_app

    app = make_app(Answerer(model), max_upload, hosts_of(host))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_AT_ONCE,
        timeout_keep_alive=5,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    begin = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await begin(sockets)
        ready()  # before that a signal would meet half of it

    server.startup = startup
    # it raises the signal that stopped it again
    with contextlib.suppress(KeyboardInterrupt), at:
        server.run(sockets=[at])
