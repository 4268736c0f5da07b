"""Train the embedded CLIP on captioned glyphs: ``python -m fastfpl.clip.train_tiny``.

First the image tower learns to name what it sees: class, domain, colour, size and place, by cross
entropy, from its pooled features and, the class, from every patch's. Then it is locked, and the
text tower learns to match captions to its features (Zhai et al. 2022, LiT, arXiv 2111.07991).
Contrastive training of both from scratch stops at the attributes: a vision transformer of this size
does not learn shapes from it in the time that two cores have.

The script is seeded and resumable: each stage checkpoints into ``--work`` and goes on from there.
It writes ``config.json``, ``bpe.txt.gz`` and ``model.safetensors`` into ``--out``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastfpl.clip.captions import HELD_OUT, WORDS, caption
from fastfpl.clip.loading import MEAN, STD
from fastfpl.clip.tiny import TINY, build_tiny
from fastfpl.data import glyphs
from fastfpl.errors import InputError
from fastfpl.seeds import generator, seed_for
from fastfpl.system import rename

__all__ = ["main", "train"]

CHECKPOINT_EVERY = 200  # steps


@dataclass(frozen=True)
class Stage:
    """How long and how fast one tower trains; without ``muon`` AdamW moves its matrices too."""

    steps: int
    batch: int
    lr: float
    warmup: int
    muon: float | None = None  # learning rate of the blocks' matrices


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    images: int = 128_000
    held_back: int = 2000  # images of the stream that only the log looks at
    image: Stage = Stage(steps=6000, batch=64, lr=1e-3, warmup=300, muon=2e-3)
    text: Stage = Stage(steps=2000, batch=128, lr=1e-3, warmup=200)
    attributes: float = 0.3  # weight of each attribute beside the class
    patches: float = 0.5  # weight of the class as the patches name it
    weight_decay: float = 0.05
    merges: int = 900
    embed: int = 128
    image_width: int = 128
    image_layers: int = 6
    text_width: int = 128
    text_layers: int = 2


def model_config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """Describe the model as open_clip does."""
    return {
        "embed_dim": recipe.embed,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": glyphs.SIDE,
            "patch_size": 4,
            "width": recipe.image_width,
            "layers": recipe.image_layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": vocabulary,
            "width": recipe.text_width,
            "heads": 4,
            "layers": recipe.text_layers,
        },
    }


def write_merges(path: Path, count: int) -> None:
    """Write the first merges of CLIP's own vocabulary; no newline at the end."""
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as full:
        lines = full.read().split("\n")[: count + 1]
    # a fixed time stamp makes the file the same on every machine
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed:
        packed.write("\n".join(lines).encode())


@dataclass(frozen=True, eq=False)
class Album:
    """The pretraining images: the first ``held_back`` rows are for the log alone.

    Attributes
    ----------
    rows : ndarray, shape (n,), int64
        Indices in the stream.
    pixels : ndarray, shape (n, 28, 28, 3), uint8
    answers : dict from question to Tensor
        Class, domain, colour, size and position of each image, shape (n,), int64 from 0.
    """

    rows: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.uint8]
    answers: dict[str, Tensor]

    def prepared(self, chosen: npt.NDArray[np.int64]) -> Tensor:
        """Give images as the tower takes them, (n, 3, 28, 28)."""
        mean = torch.tensor(MEAN, dtype=torch.float32)[:, None, None]
        std = torch.tensor(STD, dtype=torch.float32)[:, None, None]
        return (torch.from_numpy(self.pixels[chosen]).permute(0, 3, 1, 2) / 255 - mean) / std


def draw_images(recipe: Recipe, path: Path, progress: Progress) -> Album:
    """Draw the pretraining images into ``path``, once, and say what is on them."""
    stream = glyphs.pretrain()
    rng = np.random.default_rng(seed_for(recipe.seed, "which images"))
    names = (*glyphs.CLASSNAMES, *glyphs.DIGITNAMES)
    unseen = np.isin(stream.labels, [names.index(n) for n in HELD_OUT])
    rows = rng.permutation((~unseen).nonzero()[0])
    if recipe.images < 1 or len(rows) < recipe.images + recipe.held_back:
        raise InputError(
            "fastfpl.clip.train_tiny: images must be from 1 to the stream's "
            f"{len(rows) - recipe.held_back}; got {recipe.images}"
        )
    rows = rows[: recipe.images + recipe.held_back]
    if not path.exists():
        part = path.with_suffix(".part")
        pixels = np.lib.format.open_memmap(
            part, mode="w+", dtype=np.uint8, shape=(len(rows), glyphs.SIDE, glyphs.SIDE, 3)
        )
        for start in progress.track(range(0, len(rows), 512), description="drawing"):
            pixels[start : start + 512] = stream.images(rows[start : start + 512])
        pixels.flush()
        rename(part, path)
    said = [stream.attributes(int(i)) for i in rows]
    answers = {}
    for question in ("classname", "domain", "colour", "size", "position"):
        _, answer = np.unique([getattr(a, question) for a in said], return_inverse=True)
        answers[question] = torch.from_numpy(answer)
    return Album(rows, np.load(path, mmap_mode="r", allow_pickle=False), answers)


def pace(stage: Stage, step: int) -> float:
    """Share of a learning rate: warm up linearly, then follow half a cosine to zero."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.5 * (1 + float(np.cos(np.pi * share)))


def orthogonal(matrices: Tensor) -> Tensor:
    """Move all singular values of (n, rows, columns) near 1, by five Newton-Schulz steps."""
    x: Tensor = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: steps of one size in all directions of a matrix.

    Source: Jordan et al. 2024, with the step's size matched to AdamW's (Liu et al. 2025, arXiv
    2502.16982). ``torch.optim.Muon`` does the same in bfloat16, one matrix after the other; a
    processor that must imitate bfloat16 takes twenty times as long for it.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is used
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), alike in by_shape.items():
                moved = []
                for p in alike:
                    assert p.grad is not None  # the loss of a stage reaches every block
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.05)
                    moved.append(torch.lerp(p.grad, momentum, 0.95))  # Nesterov
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for p, direction in zip(alike, orthogonal(torch.stack(moved)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(size * direction)


def optimisers_of(module: nn.Module, stage: Stage, decay: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of residual blocks if the stage asks for it."""
    named = dict(module.named_parameters())
    blocks = [n for n, p in named.items() if stage.muon and "resblocks" in n and p.ndim == 2]
    wide = [p for n, p in named.items() if p.ndim >= 2 and n not in blocks]
    thin = [p for p in named.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": wide, "weight_decay": decay},
        {"params": thin, "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))]
    if stage.muon:
        found.append(Muon([named[n] for n in blocks], lr=stage.muon, weight_decay=decay))
    return found


def fit(
    name: str,
    stage: Stage,
    recipe: Recipe,
    module: nn.Module,
    loss_of: Callable[[npt.NDArray[np.int64], np.random.Generator], Tensor],
    look: Callable[[], str],
    work: Path,
    progress: Progress,
) -> None:
    """Train a module with checkpoints; a finished stage is only read back.

    ``loss_of(rows, rng)`` is the loss of a batch of rows of the album, ``look()`` a line for the
    log from images that are held back.
    """
    optimisers = optimisers_of(module, stage, recipe.weight_decay)
    rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    checkpoint = work / f"{name}.safetensors"
    first = restore(checkpoint, module, optimisers) if checkpoint.exists() else 0
    bar = progress.add_task(name, total=stage.steps, completed=first)
    for step in range(first, stage.steps):
        rng = np.random.default_rng(seed_for(recipe.seed, name, step))
        rows = recipe.held_back + np.sort(rng.choice(recipe.images, stage.batch, replace=False))
        loss = loss_of(rows, rng)
        module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser, full in zip(optimisers, rates, strict=True):
            for group, rate in zip(optimiser.param_groups, full, strict=True):
                group["lr"] = rate * pace(stage, step)
            optimiser.step()
        progress.update(bar, advance=1, description=f"{name}, loss {loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == stage.steps:
            save(checkpoint, module, optimisers, step + 1)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            with torch.no_grad():
                progress.console.print(f"{name} {step + 1}  loss {loss.item():.3f}  {look()}")


def start_like_a_trained_one(visual: Any, draws: torch.Generator) -> None:
    """Give attention the look it has after training: keys near queries, values against the stream.

    A vision transformer that starts so learns shapes from few images. Source: Trockman & Kolter
    2023, mimetic initialization (arXiv 2305.09828), with sinusoidal positions.
    """
    side, width = int(visual.grid_size[0]), visual.positional_embedding.shape[1]
    rates = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    down = waves[:, None].expand(side, side, -1)
    across = waves[None].expand(side, side, -1)
    with torch.no_grad():
        visual.positional_embedding[1:] = 0.1 * torch.cat([down, across], dim=-1).flatten(0, 1)
        for block in visual.transformer.resblocks:
            attention, scale = block.attn, width**-0.5
            eye, rank = torch.eye(width, dtype=torch.float32), width // attention.num_heads
            queries, keys, values = attention.in_proj_weight.split(width)
            for head in range(attention.num_heads):
                rows = slice(head * rank, (head + 1) * rank)
                noise = scale * torch.randn(width, width, generator=draws, dtype=torch.float32)
                u, size, v = torch.linalg.svd(0.7 * noise + 0.7 * eye)
                queries[rows] = (u[:, :rank] * size[:rank].sqrt()).T
                keys[rows] = v[:rank] * size[:rank].sqrt()[:, None]
            noise = scale * torch.randn(width, width, generator=draws, dtype=torch.float32)
            u, size, v = torch.linalg.svd(0.4 * noise - 0.4 * eye)
            values.copy_(v * size.sqrt()[:, None])
            attention.out_proj.weight.copy_(u * size.sqrt())


def image_and_patches(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Give the pooled feature and every patch's, (n, embed) and (n, patches, embed)."""
    x = visual.ln_post(visual.transformer(visual._embeds(pixels))) @ visual.proj
    return x[:, 0], x[:, 1:]


def train_image(model: Any, recipe: Recipe, album: Album, work: Path, progress: Progress) -> None:
    """Teach the image tower to name class and attributes from its pooled features.

    The class is also asked from every patch: a real CLIP's patches say what the image shows (Zhou
    et al. 2022, MaskCLIP, arXiv 2112.01071), those of a tower trained by its class token alone do
    not, and a method that compares patches with texts has nothing to go by.
    """
    sizes = [int(answer.max()) + 1 for answer in album.answers.values()]
    head = nn.Linear(recipe.embed, sum(sizes))
    classes = album.answers["classname"]

    def loss_of(rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        # small chunks stay in the processor's cache
        parts = [image_and_patches(model.visual, part) for part in album.prepared(rows).split(32)]
        pooled = torch.cat([p for p, _ in parts])
        patches = torch.cat([p for _, p in parts])
        logits = head(pooled).split(sizes, dim=1)
        losses = [
            F.cross_entropy(mine, answer[rows])
            for mine, answer in zip(logits, album.answers.values(), strict=True)
        ]
        named = F.linear(patches, head.weight[: sizes[0]], head.bias[: sizes[0]])
        asked = classes[rows].repeat_interleave(patches.shape[1])
        dense = F.cross_entropy(named.flatten(0, 1), asked)
        return (
            losses[0] + recipe.attributes * torch.stack(losses[1:]).sum() + recipe.patches * dense
        )

    def look() -> str:
        rows = np.arange(recipe.held_back)
        right = []
        for part, answer in zip(
            album.prepared(rows).split(128), classes[rows].split(128), strict=True
        ):
            pooled, patches = image_and_patches(model.visual, part)
            named = [head(x)[:, : sizes[0]].argmax(dim=1) for x in (pooled, patches.mean(dim=1))]
            right.append(torch.stack([x == answer for x in named]))
        whole, dense = torch.cat(right, dim=1).float().mean(dim=1).tolist()
        return f"class of held-back images {whole:.3f}, by their patches {dense:.3f}"

    module = nn.ModuleList([model.visual, head])
    fit("image", recipe.image, recipe, module, loss_of, look, work, progress)


def encode_captions(model: Any, tokens: Tensor) -> Tensor:
    """Run the text tower on captions sorted by length, each part cut behind its last EOT."""
    eot = tokens.argmax(dim=-1)
    order = eot.argsort()
    parts = []
    for rows in order.split(64):
        length = int(eot[rows].max()) + 1
        x = model.token_embedding(tokens[rows, :length]) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        parts.append(x[torch.arange(len(x)), eot[rows]])
    features = torch.cat(parts)[order.argsort()]
    return F.normalize(features @ model.text_projection, dim=-1)


def pull(logits: Tensor, same: Tensor) -> Tensor:
    """Half CLIP's loss (every image has its caption), half UniCL's (every caption with its word).

    Source: Radford et al. 2021 (arXiv 2103.00020); Yang et al. 2022 (arXiv 2204.03610).
    """
    own = F.cross_entropy(logits, torch.arange(len(logits)))
    alike = F.cross_entropy(logits, same / same.sum(dim=-1, keepdim=True))
    return (own + alike) / 2


class TextSide(nn.Module):
    """The parts of open_clip's model that the text stage trains."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.token_embedding = model.token_embedding
        self.ln_final = model.ln_final
        self.positional_embedding = model.positional_embedding
        self.text_projection = model.text_projection
        self.logit_scale = model.logit_scale


def train_text(
    model: Any, tokenizer: Any, recipe: Recipe, album: Album, work: Path, progress: Progress
) -> None:
    """Teach the text tower to find the locked image tower's features from captions."""
    stream = glyphs.pretrain()
    with torch.no_grad():
        every = np.arange(len(album.rows))
        parts = [
            model.visual(album.prepared(some))
            for some in progress.track(
                np.array_split(every, len(every) // 128), description="images"
            )
        ]
    features = F.normalize(torch.cat(parts), dim=-1)
    named = [name for name in WORDS if name in glyphs.CLASSNAMES]
    prompts = tokenizer([f"a photo of a {name}." for name in named])

    def loss_of(rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        worded = [caption(stream.attributes(int(i)), rng) for i in album.rows[rows]]
        text = encode_captions(model, tokenizer([sentence for sentence, _ in worded]))
        logits = model.logit_scale.exp().clamp(max=100) * features[rows] @ text.T
        words = np.array([word for _, word in worded])
        same = torch.from_numpy(words[:, None] == words[None, :])
        return (pull(logits, same) + pull(logits.T, same)) / 2

    def look() -> str:
        truth = [stream.attributes(int(i)).classname for i in album.rows[: recipe.held_back]]
        asked = np.isin(truth, named)
        scores = features[: recipe.held_back] @ encode_captions(model, prompts).T
        answer = np.array(named)[scores.argmax(dim=1).numpy()]
        right = float((answer == np.array(truth))[asked].mean())
        return f"zero-shot on held-back images {right:.3f}"

    fit("text", recipe.text, recipe, TextSide(model), loss_of, look, work, progress)


def train(recipe: Recipe, work: Path, out: Path, progress: Progress) -> None:
    """Train both stages and write the finished files."""
    from open_clip import SimpleTokenizer

    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_merges(out / "bpe.txt.gz", recipe.merges)
    tokenizer = SimpleTokenizer(bpe_path=str(out / "bpe.txt.gz"), context_length=77)
    config = model_config(recipe, tokenizer.vocab_size)
    album = draw_images(recipe, work / "images.npy", progress)
    torch.manual_seed(seed_for(recipe.seed, "weights"))
    model = build_tiny(config)
    start_like_a_trained_one(model.visual, generator(recipe.seed, "start"))
    train_image(model, recipe, album, work, progress)
    train_text(model, tokenizer, recipe, album, work, progress)
    with torch.no_grad():
        model.logit_scale.clamp_(max=float(np.log(100)))
    # 16 bits halve the file; load_clip and the model card use the rounded weights
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    write_safetensors(state, out / "model.safetensors", {"recipe": json.dumps(asdict(recipe))})
    preprocess = {
        "size": glyphs.SIDE,
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
    }
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write to a temporary name and rename."""
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    rename(part, path)


def save(path: Path, model: Any, optimisers: list[torch.optim.Optimizer], step: int) -> None:
    """Checkpoint weights and moments."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for which, optimiser in enumerate(optimisers):
        for i, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{which}.{i}.{k}": v for k, v in moments.items()}
    tensors["step"] = torch.tensor(step)
    write_safetensors({k: v.contiguous() for k, v in tensors.items()}, path, {})


def restore(path: Path, model: Any, optimisers: list[torch.optim.Optimizer]) -> int:
    """Read a checkpoint of `save` back and return its step."""
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimisers]
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, which, index, name = key.split(".")
            states[int(which)].setdefault(int(index), {})[name] = value
    for optimiser, state in zip(optimisers, states, strict=True):
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(tensors["step"])


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="checkpoints")
@click.option("--out", type=click.Path(path_type=Path), default=TINY, help="finished files")
@click.option("--image-steps", default=Recipe.image.steps, show_default=True)
@click.option("--text-steps", default=Recipe.text.steps, show_default=True)
@click.option("--images", default=Recipe.images, show_default=True)
@click.option("--seed", default=Recipe.seed, show_default=True)
def main(work: Path, out: Path, image_steps: int, text_steps: int, images: int, seed: int) -> None:
    """Train the embedded CLIP."""
    recipe = Recipe(
        seed=seed,
        images=images,
        image=replace(Recipe.image, steps=image_steps),
        text=replace(Recipe.text, steps=text_steps),
    )
    with Progress() as progress:
        train(recipe, work, out, progress)


if __name__ == "__main__":
    main()
