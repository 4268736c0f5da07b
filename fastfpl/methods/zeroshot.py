"""Zero-shot CLIP with one hand-written prompt."""

from __future__ import annotations

from pydantic import Field

from fastfpl.errors import InputError
from fastfpl.methods.base import Method, State
from fastfpl.methods.base import Options as _Options

__all__ = ["ZeroShot"]


class ZeroShot(Method):
    """The frozen CLIP with "a photo of a {class}." for every data set.

    Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.
    """

    name = "zeroshot"
    summary = "frozen CLIP, hand-written prompt"
    sends = "nothing"
    receives = "nothing"
    trains = False

    class Options(_Options):
        """Options of zero-shot CLIP."""

        words: str = Field("a photo of a", min_length=1, description="words before the class name")

    options: Options

    def server_init(self) -> State:
        """Hold the embeddings of the words."""
        if self.task.classes.position != "end":
            raise InputError(
                "fastfpl.run: position must be 'end' for zeroshot, whose words stand before the "
                f"class name; got {self.task.classes.position!r}"
            )
        return {"ctx": self.task.classes.words(self.options.words)}

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Train nothing."""
        return {}, {"ctx": down["ctx"]}

    def one_context(self, trained: State, fixed: State):  # type: ignore[no-untyped-def]
        """Return the embeddings of the words."""
        return fixed["ctx"]

    def text(self, trained: State, fixed: State):  # type: ignore[no-untyped-def]
        """Encode the hand-written prompt."""
        return self.task.encode(fixed["ctx"])
