"""Small federations by hand: a random text tower, a tokenizer of words, random image features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.config import Settings
from fastfpl.data import Shard
from fastfpl.features import TextFeatures
from fastfpl.federation import Federation
from fastfpl.federation.exams import Exam, Examiner
from fastfpl.federation.sampling import Sampling
from fastfpl.federation.server import Round
from fastfpl.methods import Batch, Method, Task, find_method, method_name
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import rounds as reference
from fastfpl.reference.text import Block, TextTower
from fastfpl.seeds import generator
from fastfpl.training.private import image_privacy
from fastfpl.training.trainer import Trainer

__all__ = [
    "NAMES",
    "SIZES",
    "WORDS",
    "Clip",
    "Feed",
    "World",
    "batch_of",
    "batches_of",
    "drawn",
    "random_tower",
]

#: Classes of a world.
NAMES = ("ant", "sea horse", "owl", "long eared bat", "fox", "elk")
#: All that its tokenizer knows.
WORDS = ("a", "photo", "of", "some", *(word for name in NAMES for word in name.split()), ".")
#: Training images of each client; a batch of 4 leaves some with one step, some with three
SIZES = (3, 5, 9, 14, 4)
TEST_SIZES = (31, 17, 23, 40, 29)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw numbers from a normal distribution that are the same in float32 and float64.

    Parameters
    ----------
    *shape : int
    seed : int
    dtype : torch.dtype
    """
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # rounded to float32, so that both dtypes start from the same numbers
    return draw.float().to(dtype)


def random_tower(
    width: int = 32, layers: int = 2, heads: int = 4, length: int = 24, dim: int = 16
) -> TextTower:
    """Draw a float64 tower whose features depend on every part of it."""
    seeds = iter(range(1000, 2000))

    def near(value: float, *shape: int, spread: float) -> Tensor:
        return value + spread * drawn(*shape, seed=next(seeds))

    def matrix(rows: int, columns: int) -> Tensor:
        return near(0, rows, columns, spread=columns**-0.5)

    def block() -> Block:
        return Block(
            ln_1_w=near(1, width, spread=0.1),
            ln_1_b=near(0, width, spread=0.1),
            qkv_w=matrix(3 * width, width),
            qkv_b=near(0, 3 * width, spread=0.1),
            out_w=matrix(width, width),
            out_b=near(0, width, spread=0.1),
            ln_2_w=near(1, width, spread=0.1),
            ln_2_b=near(0, width, spread=0.1),
            fc_w=matrix(4 * width, width),
            fc_b=near(0, 4 * width, spread=0.1),
            proj_w=matrix(width, 4 * width),
            proj_b=near(0, width, spread=0.1),
        )

    tower = TextTower(
        token_embedding=near(0, len(WORDS) + 3, width, spread=0.05),
        positional=near(0, length, width, spread=0.02),
        blocks=tuple(block() for _ in range(layers)),
        ln_w=near(1, width, spread=0.1),
        ln_b=near(0, width, spread=0.1),
        projection=matrix(width, dim),
        projection_b=None,
        heads=heads,
        activation="quick_gelu",
        eps=1e-5,
        sos=len(WORDS) + 1,
        eot=len(WORDS) + 2,
    )
    return tower.to("cpu", torch.float32).to("cpu", torch.float64)


def as_clip(clip: Any) -> Any:
    """Hand over as a CLIP what is as much of one as is needed."""
    return clip


class Clip:
    """As much of a CLIP as prompts need."""

    def __init__(self, text: TextTower) -> None:
        self.text = text

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Give words and marks their numbers."""
        return [[1 + WORDS.index(w) for w in re.findall(r"\w+|[^\w\s]+", t)] for t in texts]


class Feed:
    """Features of all clients in one tensor."""

    random = False
    paired = False

    def __init__(self, features: Tensor, labels: Tensor, domains: npt.NDArray[np.int64]) -> None:
        self._features = features
        self.split = SimpleNamespace(labels=labels.numpy(), domains=domains)

    def labels(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Return the labels of images."""
        return torch.as_tensor(self.split.labels[indices])

    def domains(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Return the domains of images."""
        return torch.as_tensor(self.split.domains[indices])

    def expect(self, batches: Any) -> None:
        """Prepare nothing: everything is in memory."""

    def batch(self, indices: npt.NDArray[np.int64], draws: Any = None) -> Tensor:
        """Return the features of images."""
        assert draws is None
        return self._features[torch.from_numpy(indices)]


def batches_of(settings: Settings, round_: int, client: int, count: int) -> list[list[Tensor]]:
    """Say in which order a client of ``count`` images sees them: one permutation an epoch."""
    size = settings.batch_size
    epochs = []
    for epoch in range(settings.local_epochs):
        order = torch.randperm(
            count, generator=generator(settings.seed, "order", round_, client, epoch)
        )
        whole = [order[i : i + size] for i in range(0, count - size + 1, size)]
        epochs.append(whole or [order])
    return epochs


def batch_of(image: Tensor, labels: Tensor, mask: Tensor | None = None, **more: Any) -> Batch:
    """Build a batch (U, B) whose domains and positions nobody looks at, unless given."""
    none = torch.zeros_like(labels)
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    return Batch(
        **{"image": image, "labels": labels, "domains": none, "positions": none}
        | {"mask": mask}
        | more
    )


@dataclass
class World:
    """One small task, as the library's federation and as a literal reference sees it.

    Attributes
    ----------
    method : str or type of Method
        A name, or a class.
    dtype : torch.dtype
        Of the library's side; the reference computes in float64.
    position : "end", "middle" or "front"
        Of the class name in the prompt.
    options : dict
        The method's.
    settings : dict
        Fields of `fastfpl.Settings`; without them two local epochs of batches of 4, four rounds.
    tau : float
        Multiplier of cosine similarities.
    n_ctx : int
        Context vectors.
    sizes : tuple of int
        Training images of each client.
    """

    method: str | type[Method] = "promptfl"
    dtype: torch.dtype = torch.float32
    position: Literal["end", "middle", "front"] = "end"
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tau: float = 8.0
    n_ctx: int = 3
    sizes: tuple[int, ...] = SIZES

    def __post_init__(self) -> None:
        self.method = method_name(self.method, "fastfpl.testing")
        self.tower = random_tower()
        self.clip = Clip(self.tower.to("cpu", self.dtype))
        self.classes = ClassPrompts(as_clip(self.clip), NAMES, self.position)
        defaults = {
            "local_epochs": 2,
            "batch_size": 4,
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 0.05,
            "rounds": 4,
        }
        self.config = Settings(
            method=self.method, options=self.options, **{**defaults, **self.settings}
        )
        self.clients: list[reference.Client] = []
        for u, size in enumerate(self.sizes):
            sides = []
            for k, n in enumerate((size, TEST_SIZES[u])):
                image = torch.nn.functional.normalize(
                    drawn(n, self.tower.dim, seed=100 * u + k), dim=-1
                )
                label = torch.randint(
                    len(NAMES), (n,), generator=torch.Generator().manual_seed(100 * u + k + 50)
                )
                sides += [image.float().double(), label]
            self.clients.append(reference.Client(*sides))

    @property
    def client_domains(self) -> tuple[int, ...]:
        """Visual domain of each client, one of two."""
        return tuple(u % 2 for u in range(len(self.sizes)))

    def federation(self) -> Federation:
        """Build the library's side."""

        def shards(counts: list[int]) -> list[npt.NDArray[np.int64]]:
            ends = np.cumsum(counts)
            return [np.arange(e - n, e) for e, n in zip(ends, counts, strict=True)]

        sides: dict[str, Any] = {}
        for side in ("train", "test"):
            image = torch.cat([getattr(c, side) for c in self.clients]).to(self.dtype)
            label = torch.cat([getattr(c, f"{side}_labels") for c in self.clients])
            counts = [len(getattr(c, side)) for c in self.clients]
            # two domains, each client of one
            domains = np.repeat(self.client_domains, counts)
            sides[side] = Feed(image, label, domains), shards(counts)
        task = Task(
            classes=self.classes,
            logit_scale=self.tau,
            clients=len(self.clients),
            domains=("ink", "photo"),
            client_domains=self.client_domains,
            n_ctx=self.n_ctx,
            ctx_init=None,
            lr=self.config.lr,
            seed=self.config.seed,
            text_features=TextFeatures(verify=True),
        )
        assert isinstance(self.method, str)
        method = find_method(self.method)(task, self.options)
        trainer = Trainer(
            settings=self.config,
            method=method,
            feed=sides["train"][0] if method.trains else None,
            images=dict(enumerate(sides["train"][1])),
            private=image_privacy(self.config, method),
        )
        feed, images = sides["test"]
        exam = Exam("own", "its own test images", method, feed, images, ("ink", "photo"))
        clients = len(self.clients)
        nobody: Any = None  # asks it for a CLIP or for images
        return Federation(
            clip=nobody,
            dataset=nobody,
            shards=[Shard(*pair) for pair in zip(sides["train"][1], sides["test"][1], strict=True)],
            trainer=trainer,
            examiner=Examiner(trainer, [exam], clients),
            sampling=Sampling(self.config, clients, self.client_domains, method.all_first),
            now=Round.first(method),
        )

    def setup(self, factors: list[list[float]] | None = None) -> reference.Setup:
        """Build the reference's side, in float64."""
        s = self.config
        return reference.Setup(
            tower=self.tower,
            layout=self.classes.layout(self.n_ctx),
            logit_scale=self.tau,
            lr=s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            factors=factors or [[1.0] * s.local_epochs] * s.rounds,
        )

    def plan(self, selected: Sequence[Sequence[int]]) -> list[dict[int, list[list[Tensor]]]]:
        """Spell out the data order of rounds."""
        return [
            {i: batches_of(self.config, t, i, len(self.clients[i].train)) for i in members}
            for t, members in enumerate(selected)
        ]
