"""What was trained, for other programs: a classifier, a state dict of CoOp, a program."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fastfpl.errors import InputError, NotSupported, cut, near, shown
from fastfpl.files import write_whole
from fastfpl.ops.precision import without_autocast
from fastfpl.trained.predictions import Client
from fastfpl.trained.program import as_onnx, as_torch

__all__ = ["FORMATS", "export"]

OP = "fastfpl.export"
# how far from length 1 a feature may be, and from each other what must be equal, of a cosine
_CLOSE = 1e-5


def _classifier(client: Client) -> bytes:
    """Write ``weight`` (C, D) of unit rows and ``logit_scale``; what else counts is metadata."""
    weight = _one_feature(client, "torch")
    clip = client.eye.clip
    task = client.head.method.task
    metadata = {
        "format": "fastfpl-classifier-1",
        "classnames": json.dumps(list(client.classnames), ensure_ascii=False),
        "clip": clip.name,
        "pretrained": clip.pretrained,
        "image_size": str(clip.image_size),
        "mean": json.dumps(list(client.eye.mean)),
        "std": json.dumps(list(client.eye.std)),
    }
    tensors = {
        "weight": weight.detach().cpu().contiguous().clone(),
        "logit_scale": torch.tensor(task.logit_scale, dtype=torch.float32),
    }
    return save(tensors, metadata=metadata)


def _coop(client: Client) -> bytes:
    """Write the tensors that a prompt learner of CoOp registers, under the model's names."""
    head = client.head
    method = head.method
    with torch.no_grad(), without_autocast():
        found = method.one_context(head.trained, head.fixed)
        features = head.class_features()
        if found is not None and features is not None:
            # a subclass may have changed what is encoded, and not what it says of it
            again = method.task.encode(found)[0]
            found = found if _near(again, features) else None
    if found is None or features is None:
        raise NotSupported(
            f"{OP}: a state dict of CoOp must hold one context; got {method.name}, which "
            f"{method.scores if features is None else 'encodes more than one context'}; export "
            "it to torch"
        )
    ctx = found[0]
    tower = method.task.classes.tower
    if tower.sos is None:
        raise NotSupported(
            f"{OP}: the text tower must begin with SOS for a state dict of CoOp; got "
            f"{client.eye.clip.name!r}; export it to torch"
        )
    # CoOp cuts the embedding of "X X X name." behind SOS and context, wherever the name stands
    tokens = method.task.classes.at("end").layout(len(ctx)).tokens
    embedded = tower.token_embedding[tokens]
    state = {
        "prompt_learner.ctx": ctx,
        "prompt_learner.token_prefix": embedded[:, :1],
        "prompt_learner.token_suffix": embedded[:, 1 + len(ctx) :],
    }
    buffer = io.BytesIO()
    torch.save({n: t.detach().cpu().contiguous().clone() for n, t in state.items()}, buffer)
    return buffer.getvalue()


def _one_feature(client: Client, otherwise: str) -> Tensor:
    """Return the unit features (C, D) that an image is compared with, or say what is instead."""
    head = client.head
    features = head.class_features()
    if features is not None:
        length = features.float().norm(dim=-1)
        # 16 bits round a unit length too
        if bool(((length - 1).abs() < max(_CLOSE, 2 * torch.finfo(features.dtype).eps)).all()):
            return features
    raise NotSupported(
        f"{OP}: a classifier must be one text feature of unit length a class; got "
        f"{head.method.name}, which {head.method.scores}; export it to {otherwise}"
    )


def _near(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape
    return same and bool(((one - other).abs() < _CLOSE).all())


#: What writes each format.
FORMATS: Mapping[str, Callable[[Client], bytes]] = {
    "classifier": _classifier,
    "coop": _coop,
    "torch": as_torch,
    "onnx": as_onnx,
}


def export(client: Client, to: str, out: str | Path) -> Path:
    """Write one client's model for programs without fastfpl.

    Parameters
    ----------
    client : Client
        Of `fastfpl.load`; over other classes by `Client.on`.
    to : str
        ``"classifier"``: safetensors of ``weight`` (C, D), rows of unit length, and
        ``logit_scale``, the multiplier; metadata ``classnames``, ``mean``, ``std`` (JSON lists),
        ``clip``, ``pretrained``, ``image_size``. ``"coop"``: a state dict with
        ``prompt_learner.ctx`` (T, W), ``token_prefix`` and ``token_suffix``, plain tensors of
        `torch.save`. ``"torch"``: a `torch.export` program from pixels (B, 3, S, S), uint8, to
        logits (B, C), image tower and normalisation included. ``"onnx"``: the same for ONNX.
    out : path
        Must not be there.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    NotSupported
        If the format cannot hold what the method does; the sentence says why, and which can.
    Missing
        If a package that writes the format is not there.
    Differs
        If the program answers otherwise than the client.
    InputError
        If the format is unknown, ``out`` is there already or cannot be written.
    """
    if to not in FORMATS:
        raise InputError(f"{OP}: format must be known; got {shown(to)}" + near(cut(to), FORMATS))
    path = Path(out)
    if os.path.lexists(path):
        raise InputError(f"{OP}: out must not be there yet; got {cut(str(path))}: name another")
    content = FORMATS[to](client)

    def write(part: Path) -> None:
        part.write_bytes(content)

    write_whole(path, write)
    return path
