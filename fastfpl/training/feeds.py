"""What training steps and evaluations see of the images: features, cached or fresh."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.clip import FrozenCLIP
from fastfpl.clip.frozen import unit
from fastfpl.config import Settings
from fastfpl.data import Images, Split
from fastfpl.data.loader import Job, Loader, Resident, Workers
from fastfpl.data.transforms import Preprocess
from fastfpl.errors import InputError
from fastfpl.features import (
    DeviceFeatures,
    DeviceRoom,
    FeatureKey,
    Features,
    FeatureStore,
    Whole,
    gathered,
    moved,
)
from fastfpl.seeds import seed_for
from fastfpl.tracking.callback import ENCODING

__all__ = [
    "ENCODING",
    "RESIDENT",
    "Encoder",
    "Eye",
    "Feed",
    "Observer",
    "evaluation_feed",
    "silent",
    "training_feed",
]

#: ``observer(what, done, total)`` is told of every long step.
Observer = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


Indices = npt.NDArray[np.int64]

# batches on their way to a device
_AHEAD = 4
#: Stored features of one side of a feed, one entry a view; on the host, or all on the device.
Views = list[Features] | DeviceFeatures
#: Bytes of decoded images that stay where they are used again, unless settings say otherwise: the
#: few-shot sets of a hundred classes fit.
RESIDENT = 1 << 30


class Encoder:
    """Encodes images of a split, while threads prepare those that will be asked for next.

    Parameters
    ----------
    eye : Eye
    read : callable
        ``read(indices)`` returns images.
    cut : callable
        ``cut(images, seeds)`` returns their pixels, uint8.
    """

    def __init__(
        self,
        eye: Eye,
        read: Callable[[Indices], Images],
        cut: Callable[[Images, Indices | None], Tensor],
    ) -> None:
        pinned = eye.clip.device.type == "cuda"
        self._eye = eye
        self._loader = Loader(read, cut, eye.clip.image_size, eye.workers, pinned=pinned)

    def expect(self, jobs: Iterable[Job]) -> None:
        """Be told what will be asked for next; see `Loader.expect`."""
        self._loader.expect(jobs)

    def __call__(self, indices: Indices, seeds: Indices | None = None) -> Tensor:
        """Features of images (b,), each drawn by its seed, on the device."""
        return self._eye.encode(self._loader.pixels(indices, seeds))

    def kinds(self, indices: Indices, seeds: Indices | None = None) -> tuple[Tensor, ...]:
        """Features of every one of the eye's kinds, in their order."""
        return self._eye.encode_kinds(self._loader.pixels(indices, seeds))


class Feed:
    """Image features of one split.

    Parameters
    ----------
    device : torch.device
    split : Split
    rows : ndarray, shape (n,), int64
        Images that may be asked for, ascending.
    plain : list of Features, or Encoder
        One entry a view, each with n rows; or what encodes every batch afresh.
    strong : likewise, optional
        The strongly augmented view.
    dtype : torch.dtype, optional
        What features that were stored are converted to; theirs if left out.
    room : DeviceRoom, optional
        Where they stay if they fit; without one they come batch by batch.
    """

    def __init__(
        self,
        device: torch.device,
        split: Split,
        rows: Indices,
        plain: list[Features] | Encoder,
        strong: list[Features] | Encoder | None = None,
        *,
        dtype: torch.dtype | None = None,
        room: DeviceRoom | None = None,
    ) -> None:
        self.split = split
        self.paired = strong is not None
        self.random = isinstance(plain, Encoder) or len(plain) != 1 or self.paired
        self._device = device
        self._rows = rows

        def kept(side: list[Features] | Encoder) -> Views | Encoder:
            return side if room is None or isinstance(side, Encoder) else room.keep(side)

        self._plain = kept(plain)
        self._strong = None if strong is None else kept(strong)
        self._dtype = dtype
        self._copies: deque[torch.cuda.Event] = deque()

    def labels(self, indices: Indices) -> Tensor:
        """Labels of images, any shape, int64."""
        return moved(torch.from_numpy(self.split.labels[indices]), self._device)

    def domains(self, indices: Indices) -> Tensor:
        """Visual domains of images, any shape, int64."""
        return moved(torch.from_numpy(self.split.domains[indices]), self._device)

    def expect(self, batches: Iterable[tuple[Indices, Indices | None]]) -> None:
        """Be told of the next batches, indices and draws, so that they can be prepared ahead."""
        asked = [(at, draws) for at, draws in batches if draws is not None]
        for source in (self._plain, self._strong):
            if isinstance(source, Encoder):
                source.expect([(at.reshape(-1), draws.reshape(-1)) for at, draws in asked])

    def batch(self, indices: Indices, draws: Indices | None = None) -> Tensor:
        """Features of images of any index shape (...): (..., D) or (..., P, D).

        ``draws``, integers of the same shape, choose the view or seed the augmentation; a feed
        that is not `random` needs none.
        """
        return self._view(self._plain, indices, draws)

    def strong(self, indices: Indices, draws: Indices) -> Tensor:
        """Features of the strongly augmented view, as `batch` gives those of the plain one."""
        assert self._strong is not None
        return self._view(self._strong, indices, draws)

    def _view(self, source: Views | Encoder, indices: Indices, draws: Indices | None) -> Tensor:
        flat = indices.reshape(-1)
        if isinstance(source, Encoder):
            assert draws is not None
            features = source(flat, draws.reshape(-1))  # on the device: the tower made them
        else:
            at = np.searchsorted(self._rows, flat)
            which = None
            if len(source) > 1:
                assert draws is not None
                which = draws.reshape(-1) % len(source)
            features = gathered(source, at, self._device, which)
            if self._dtype is not None:
                features = features.to(self._dtype)
        self._stay_near()
        return features.reshape(*indices.shape, *features.shape[1:])

    def _stay_near(self) -> None:
        """Let the host be a few batches ahead of a CUDA device, not an epoch of pinned memory."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._copies.append(event)
        if len(self._copies) > _AHEAD:
            # the device has the work of the batches since then
            self._copies.popleft().synchronize()


@dataclass(frozen=True, eq=False)
class Eye:
    """How a frozen CLIP looks at images for one method.

    Attributes
    ----------
    clip : FrozenCLIP
    kind : "pooled", "raw" or "patches"
        As `Method.image_kind`.
    store : FeatureStore
    observer : Observer
    mean, std : tuple of float
        What pixels are normalised by.
    workers : Workers
        Who prepares pixels.
    resident : int
        Bytes of decoded images that stay in memory where they are used again.
    dtype : torch.dtype
        Of features that are stored; the CLIP's if left out.
    room : DeviceRoom, optional
        Of the device, for features that are used again; without one they come batch by batch.
    also : tuple of str
        Kinds that other methods will ask of the same images: of the same pass, they are stored too.
    """

    clip: FrozenCLIP
    kind: str
    store: FeatureStore
    observer: Observer
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    workers: Workers = field(default_factory=lambda: Workers(0))
    resident: int = RESIDENT
    dtype: torch.dtype | None = None
    room: DeviceRoom | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "patches" in self.kinds and self.clip.patches is None:
            whom = "this method" if self.kind == "patches" else "a method of these"
            raise InputError(
                f"fastfpl.run: clip must give features of patches for {whom}; got "
                f"{self.clip.name!r}, which has none; use a ViT or a modified ResNet"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its kind, then those that others will ask for."""
        return tuple(dict.fromkeys((self.kind, *self.also)))

    def alone(self) -> Eye:
        """Look for one method only."""
        return replace(self, also=())

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 as they were cut, into features of the kind."""
        return self.alone().encode_kinds(pixels)[0]

    def encode_kinds(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode pixels as `encode` does, into features of every kind, in one pass."""
        here = moved(pixels, self.clip.device)
        ready = self.prepare.normalised(here).to(self.clip.dtype)
        kinds, found = self.kinds, dict[str, Tensor]()
        if kinds == ("patches",):
            found["patches"] = self.clip.encode_image_tokens(ready)
        elif "patches" in kinds:
            found["raw"], tokens = self.clip.encode_image_both(ready, normalize=False)
            found["patches"] = unit(tokens)
        else:
            found["raw"] = self.clip.encode_image(ready, normalize=False)
        if "pooled" in kinds:
            found["pooled"] = unit(found["raw"])
        return tuple(found[kind] for kind in kinds)

    @property
    def prepare(self) -> Preprocess:
        """Size and normalisation of pixels."""
        return Preprocess(self.clip.image_size, self.mean, self.std)


def training_feed(
    eye: Eye, split: Split, rows: Indices, settings: Settings, *, paired: bool = False
) -> Feed:
    """Feed training steps with the settings' augmentation.

    A paired feed's plain view is the deterministic one; ``augment`` decides whether the strong view
    is drawn anew every time or is one of a fixed number of views.
    """
    prepare, alone = eye.prepare, eye.alone()
    # crops of one image are cut anew from the same pixels
    again = settings.augment == "fresh" or settings.views + paired > 1
    read = Resident(split, eye.resident).images if again and eye.resident else split.images

    def crop(images: Images, seeds: Indices | None) -> Tensor:
        assert seeds is not None
        return prepare.crops(images, seeds, scale=(settings.crop, 1.0), flip=settings.flip)

    def distort(images: Images, seeds: Indices | None) -> Tensor:
        assert seeds is not None
        return prepare.distorted(images, seeds)

    def views(
        cut: Callable[[Images, Indices | None], Tensor], name: str, of: Eye = eye
    ) -> list[Features]:
        # views do not depend on the run's seed, so that runs share them
        return [
            _stored(
                *(of, split, "train", rows, f"{name}-{v}", Encoder(of, read, cut)),
                what=f"view {v + 1} of {settings.views}",
                seed=v,
            )
            for v in range(settings.views)
        ]

    fresh, dtype = settings.augment == "fresh", eye.clip.dtype
    if paired:
        # others see the images of their training in other views
        plain = [_plain(alone, split, "train", rows, read)]
        strong = Encoder(eye, read, distort) if fresh else views(distort, "strong", alone)
        return Feed(eye.clip.device, split, rows, plain, strong, dtype=dtype, room=eye.room)
    if fresh:
        return Feed(eye.clip.device, split, rows, Encoder(eye, read, crop))
    if settings.augment == "none":
        stores = [_plain(eye, split, "train", rows, read)]
    else:
        stores = views(crop, f"crop-{settings.crop}-{settings.flip}")
    return Feed(eye.clip.device, split, rows, stores, dtype=dtype, room=eye.room)


def evaluation_feed(eye: Eye, split: Split, name: str, rows: Indices) -> Feed:
    """Feed evaluations: one deterministic view of every image."""
    stores = [_plain(eye, split, name, rows, split.images)]
    return Feed(eye.clip.device, split, rows, stores, dtype=eye.clip.dtype, room=eye.room)


def _plain(
    eye: Eye, split: Split, name: str, rows: Indices, read: Callable[[Indices], Images]
) -> Features:
    encode = Encoder(eye, read, lambda images, seeds: eye.prepare.squares(images))
    return _stored(eye, split, name, rows, "centre", encode, what="images")


def _stored(
    eye: Eye,
    split: Split,
    name: str,
    rows: Indices,
    view: str,
    encode: Encoder,
    *,
    what: str,
    seed: int | None = None,
) -> Features:
    """Open the features of images, encoding what is not there; ``seed`` draws the view of each."""
    # few-shot runs need a small part of the training split: only that part is encoded
    every = len(rows) == len(split)
    part = "all" if every else f"{seed_for(0, *rows.tolist()):016x}"
    clip = eye.clip
    key = FeatureKey(
        weights=clip.weights_digest,
        data=split.fingerprint,
        split=f"{name}-{part}",
        view=f"{view}-{clip.image_size}-{eye.mean}-{eye.std}",
        kind=eye.kind,
        dtype=str(eye.dtype or clip.dtype).removeprefix("torch."),
    )

    def job(at: Indices) -> Job:
        if seed is None:
            return rows[at], None
        return rows[at], np.array([seed_for(seed, "view", int(i)) for i in rows[at]])

    def jobs(chunks: Iterable[Indices]) -> Iterator[Job]:
        return (job(at) for at in chunks)

    title = f"{ENCODING} {name} {what}"
    return eye.store.get(
        key,
        len(rows),
        lambda at: encode.kinds(*job(at)),
        lambda done, n: eye.observer(title, done, n),
        ahead=lambda chunks: encode.expect(jobs(chunks)),
        # as `fastfpl encode` makes it; views are drawn for an image, whatever is encoded with it
        whole=None
        if every
        else Whole(replace(key, split=f"{name}-all"), len(split), rows.astype(np.int64)),
        also=[replace(key, kind=kind) for kind in eye.kinds[1:]],
    )
