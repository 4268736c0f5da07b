"""A run's model, asked about one image at a time by several people at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from fastfpl.errors import Damaged, InputError
from fastfpl.trained import Client, Model
from fastfpl.trained.images import pictures

__all__ = ["MOST_TOP", "Answer", "Answerer"]

#: Classes that are answered at most.
MOST_TOP = 1000
#: What the one model of a method without personal ones is asked for by.
GLOBAL = "global"
#: Clients whose encoded prompts stay in memory.
_READY = 32


@dataclass(frozen=True)
class Answer:
    """What is said of an image.

    Attributes
    ----------
    client : str
    classes, zero_shot : list of (str, float)
        Likeliest classes with their probabilities, of the client and of the frozen CLIP with a
        hand-written prompt, best first.
    """

    client: str
    classes: list[tuple[str, float]]
    zero_shot: list[tuple[str, float]]


class Answerer:
    """Answers for the clients of a run; one image is computed at a time.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._alone = threading.Lock()
        self._ready: OrderedDict[str, Client] = OrderedDict()
        self._zero_shot = model.zero_shot()

    @property
    def clients(self) -> list[tuple[str, str]]:
        """What each client is asked for by, and what people call it; first a model for all."""
        model = self.model
        if not model.method.personal:
            return [(GLOBAL, "everybody")]
        names = model.names
        own = [
            (names[n], names[n]) if names else (str(n), f"client {n}")
            for n in range(model.clients + model.newcomers)
        ]
        return [*own, *((name, f"{name} (came later)") for name in model.joined)]

    def ask(self, image: bytes, client: str | None = None, top: int = 5) -> Answer:
        """Classify an image.

        Parameters
        ----------
        image : bytes
            Content of an image file.
        client : str, optional
            A number or a name; needed where clients answer with parameters of their own.
        top : int
            Classes that are named.

        Raises
        ------
        FastfplError
            With a sentence that can be shown: no image, no such client.
        """
        if not 1 <= top <= MOST_TOP:
            raise InputError(f"fastfpl.serve: top must be from 1 to {MOST_TOP}; got {top}")
        (picture,) = pictures(image)
        # of several big images at once only one is decoded
        with self._alone:
            one = self._client(client)
            try:
                pixels = picture.read()
            except Damaged as error:  # the image is, not the run
                raise InputError(str(error)) from None
            (mine,) = one.predict(pixels).top(top)
            (zero,) = self._zero_shot.predict(pixels).top(top)
        return Answer(one.name, mine, zero)

    def _client(self, name: str | None) -> Client:
        personal = self.model.method.personal
        key = name or ""
        if not key and personal:
            raise InputError(
                "fastfpl.serve: client must be named, since clients answer with parameters of "
                "their own; got none"
            )
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        everybody = not personal and key in ("", GLOBAL)
        found = self.model.global_model() if everybody else self.model.client(key)
        self._ready[key] = found
        if len(self._ready) > _READY:
            self._ready.popitem(last=False)
        return found
