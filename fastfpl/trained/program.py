"""A client as one program of tensor operations: image tower, head, nothing of this library."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfpl.errors import Differs, FastfplError, Missing, NotSupported
from fastfpl.ops.precision import without_autocast
from fastfpl.trained.predictions import Client

__all__ = ["as_onnx", "as_torch"]

OP = "fastfpl.export"
# how far the logits of a program may be from the client's, over the multiplier
_CLOSE = 1e-4
# images on which that is tried, and images of the batch that is traced: 0 and 1 would stay fixed
_TRIED, _TRACED = 3, 2


class _Program(nn.Module):
    """Pixels (B, 3, S, S), uint8, -> logits (B, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, client: Client) -> None:
        super().__init__()
        clip, head = client.eye.clip, client.head
        self._tower = clip.image_tower
        # registered, so that a program names their weights
        self.image = self._tower.module
        trunk = getattr(self._tower, "trunk", None)
        if trunk is not None:
            self.trunk = trunk
        self._kind, self._dtype = head.method.image_kind, clip.dtype
        self.register_buffer("mean", _channels(client.eye.mean))
        self.register_buffer("std", _channels(client.eye.std))
        self._stored = client.eye.dtype or clip.dtype
        self._head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, encode, score."""
        ready = (pixels.to(torch.float32) / 255 - self.mean) / self.std
        ready = ready.to(self._dtype)
        if self._kind == "patches":
            features = self._tower.tokens(ready)[:, 1:]
        else:
            features = self._tower.pooled(ready)
        if self._kind != "raw":
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            features = F.normalize(wide, dim=-1)
        features = features.to(self._stored).to(self._dtype)[None]
        head = self._head
        logits = head.method.traced_logits(head.text, head.trained, head.fixed, features)
        return logits[0]


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _exported(client: Client) -> torch.export.ExportedProgram:
    """Trace a client, and refuse a program that answers otherwise."""
    clip, method = client.eye.clip, client.head.method
    if method.scored_together > 1:
        raise NotSupported(
            f"{OP}: an image's answer must depend on nothing but the image; got {method.name} as "
            f"released, which stops {method.scored_together} images together"
        )
    here = _on_cpu(client)
    program = _Program(here).eval()
    side = clip.image_size
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_TRIED, 3, side, side), generator=draw, dtype=torch.uint8)
    try:
        with torch.no_grad(), without_autocast(), _quiet():
            exported = torch.export.export(
                program,
                (pixels[:_TRACED],),
                dynamic_shapes={"pixels": {0: torch.export.Dim("images")}},
            )
    except FastfplError:
        raise
    except Exception as error:  # whatever a tower or a method of others does that cannot be traced
        raise NotSupported(
            f"{OP}: tower and method must be operations on tensors that depend on no value; got "
            f"{type(error).__name__} of {clip.name!r} with {method.name}: "
            f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no reason'}"
        ) from error
    with torch.no_grad(), without_autocast():
        mine = here.logits(_seen(here, pixels)).double()
        away = (exported.module()(pixels).double() - mine).abs().max().item() / _unit(here)
    rounding = torch.finfo(clip.dtype).eps
    if not away <= max(_CLOSE, 8 * rounding):
        raise Differs(
            f"{OP}: the program must answer as the client; got logits that differ by {away:.1e} of "
            f"the multiplier, for {method.name} over {clip.name!r}"
        )
    return exported


def _seen(client: Client, pixels: Tensor) -> Tensor:
    eye = client.eye
    features = eye.encode(pixels)
    return features.to(eye.dtype or eye.clip.dtype).to(eye.clip.dtype)


def _unit(client: Client) -> float:
    return max(1.0, client.head.method.task.logit_scale)


def _on_cpu(client: Client) -> Client:
    """Return the client with everything on the CPU; a program can be moved from there."""
    clip = client.eye.clip
    if clip.device.type == "cpu":
        return client
    return client.moved(clip.to("cpu"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the tracer says of its own inside to itself."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def as_torch(client: Client) -> bytes:
    """Write a program of `torch.export`; ``extra_files`` has ``classnames.json``."""
    exported = _exported(client)
    buffer = io.BytesIO()
    names = json.dumps(list(client.classnames), ensure_ascii=False)
    with _quiet():
        torch.export.save(exported, buffer, extra_files={"classnames.json": names})
    return buffer.getvalue()


def as_onnx(client: Client) -> bytes:
    """Write a program of ONNX."""
    lacking = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if lacking:
        raise Missing(
            f"{OP}: onnx and onnxscript must be installed to write onnx; got no "
            f"{' and no '.join(lacking)}: pip install fastfpl[onnx]"
        )
    exported = _exported(client)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        try:
            written = torch.onnx.export(
                exported,
                input_names=["pixels"],
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # an operation that ONNX has not, such as FedOTP's loop
            raise NotSupported(
                f"{OP}: every operation must have a form in ONNX; got {type(error).__name__} for "
                f"{client.head.method.name}; export it to torch"
            ) from error
        assert written is not None
        written.save(path, external_data=False)
        return path.read_bytes()
