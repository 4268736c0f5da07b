"""The server's side of a federation as a value: a `Round` in, the next `Round` out.

Nothing here trains, reads or writes; whoever drives a federation, in this process or over a
network, holds a `Round`, hands its downloads out and gets the next one from the uploads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastfpl.errors import NotConverged
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload
from fastfpl.methods.contract import asked, check_merged, furthest

__all__ = ["Round"]


@dataclass(frozen=True, eq=False)
class Round:
    """What the server goes on from: everything that a round depends on but the clients' own.

    Attributes
    ----------
    number : int
        Of the round that comes next, from 0.
    server : State
        What the server holds before it.
    handed : State
        What is handed from client to client; empty unless quirks of released code ask for it.
    """

    number: int
    server: State
    handed: State = field(default_factory=dict)

    @classmethod
    def first(cls, method: Method) -> Round:
        """Begin a federation."""
        return cls(0, method.server_init())

    def download(self, method: Method, client: int) -> State:
        """Return what the server sends to a client in this round."""
        return method.download(self.server, client, self.number)

    def after(
        self,
        method: Method,
        uploads: Mapping[int, Upload],
        images: Mapping[int, int],
        handed: State,
    ) -> Round:
        """Merge what arrived; return the next round.

        Parameters
        ----------
        method : Method
        uploads : mapping from client to state
        images : mapping from client to int
            Training images of each client that sent an upload. Whoever trained first, the method
            sees uploads in the order of client numbers.
        handed : State
            What the last client handed on.

        Raises
        ------
        NotConverged
            If no client could go on from what was merged.
        """
        uploads = {client: uploads[client] for client in sorted(uploads)}
        sent = dict.fromkeys(n for state in uploads.values() for n in state)
        with asked(method, "merge", upload=sent, server=self.server):
            merged = method.merge(self.server, uploads, images, self.number)
        merged = check_merged(method, self.server, merged)
        wrong = furthest({"merged": {name: t[None] for name, t in merged.items()}}, 1)
        if wrong is not None:
            _, name, _, value = wrong
            raise NotConverged(
                f"fastfpl.run: what is merged must stay finite, its squares too; got {value:g} in "
                f"{name!r} of the server in round {self.number}; lower lr={method.task.lr}"
            )
        return Round(self.number + 1, merged, handed)

    def untrained(self) -> Round:
        """Return the next round where nobody trained."""
        return replace(self, number=self.number + 1)
