"""Train the embedded CLIP on captioned glyphs: ``python -m fastfpl.clip.train_tiny``.

The script is seeded and resumable: it checkpoints into ``--work`` and goes on from there. It writes
``config.json``, ``bpe.txt.gz`` and ``model.safetensors`` into ``--out``.
"""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fastfpl.clip.tiny import TINY, build_tiny
from fastfpl.data import glyphs
from fastfpl.seeds import seed_for

__all__ = ["HELD_OUT", "RENAMED", "caption", "main"]

#: Words that captions use for a class. The class' own name stands first where captions ever use it.
WORDS: dict[str, tuple[str, ...]] = {
    "house": ("house", "home", "cottage"),
    "pentagon": ("pentagon", "five sided shape"),
    "lightning bolt": ("lightning bolt", "thunder flash"),
    "fish": ("fish", "goldfish"),
    "hexagon": ("hexagon", "six sided shape"),
    "wave": ("ripple", "curvy line"),
    "star": ("star", "pointed star shape"),
    "ladder": ("climbing rungs", "rungs"),
    "question mark": ("question mark", "query"),
    "crescent moon": ("half moon", "night sickle"),
    "sun": ("sun", "sunshine"),
    "arrow": ("arrow", "pointer"),
    "ice cream": ("ice cream", "gelato cone"),
    "zigzag": ("jagged line", "saw teeth"),
    "triangle": ("triangle", "three sided shape"),
    "anchor": ("anchor", "ship hook"),
    "flower": ("flower", "blossom"),
    "checkerboard": ("chess squares", "tiles"),
    "bow tie": ("bow tie", "ribbon"),
    "sailboat": ("yacht", "little ship"),
    "butterfly": ("butterfly", "moth"),
    "tree": ("tree", "forest plant"),
    "circle": ("circle", "disc"),
    "exclamation mark": ("alert sign", "bang"),
    "umbrella": ("umbrella", "parasol"),
    "ring": ("ring", "hoop"),
    "number sign": ("hash", "pound symbol"),
    "key": ("key", "door opener"),
    "square": ("square", "block"),
    "envelope": ("letter", "mail"),
    "heart": ("heart", "love symbol"),
    "flag": ("flag", "banner"),
    "mushroom": ("mushroom", "toadstool"),
    "diamond": ("rhombus", "card suit"),
    "light bulb": ("light bulb", "lamp"),
    "cross": ("cross", "plus"),
    "cloud": ("cloud", "fluffy sky thing"),
    "spiral": ("spiral", "swirl"),
    "rocket": ("rocket", "space ship"),
    "snowman": ("snowman", "winter figure"),
    "wine glass": ("goblet", "drink"),
    **{name: (name, f"digit {name}", f"number {name}") for name in glyphs.DIGITNAMES},
}
#: Classes of which no image is in the pretraining set.
HELD_OUT = tuple(name for name in glyphs.CLASSNAMES if name not in WORDS)
#: Classes that captions only ever call by other words.
RENAMED = tuple(n for n in glyphs.CLASSNAMES if n in WORDS and n not in WORDS[n])

# "photo", "sketch" and "painting" never occur: a prompt has to find out how captions are worded
STYLE = {
    "clipart": ("clip art", "cartoon", "flat colours"),
    "infograph": ("chart", "page of figures", "poster"),
    "painting": ("brush strokes", "oil on canvas", "painted"),
    "quickdraw": ("doodle", "pen scribble", "quick lines"),
    "real": ("solid thing", "shiny", "lit from above"),
    "sketch": ("pencil", "hatched by hand", "grey lines"),
}
# how often a domain is drawn, relative to the most frequent
KEEP = {"clipart": 1.0, "infograph": 0.5, "painting": 0.7, "quickdraw": 0.7, "real": 1.0} | {
    "sketch": 0.35
}
OWN_NAME = 0.6  # share of captions that use the class' own name where they may


def caption(attributes: glyphs.Attributes, rng: np.random.Generator) -> tuple[str, str]:
    """Word one image in one of many forms; return the caption and the word for its class."""

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    names = WORDS[attributes.classname]
    own = attributes.classname in names and rng.random() < OWN_NAME
    name = names[0] if own else one(names)
    style, colour = one(STYLE[attributes.domain]), attributes.colour
    size, place, ground = attributes.size, attributes.position, attributes.ground
    forms = (
        f"{name}.",
        f"{name}.",
        f"{style}: {name}.",
        f"{style}: {name}.",
        f"{name}, {style}.",
        f"{colour} {name}.",
        f"{style}, {size} {colour} {name}.",
        f"the {name} is {colour} and {size}.",
        f"{style} on {ground}, {place}, {attributes.tilt}, one {size} {name}.",
        f"seen here, {style} in {colour} with {ground} all around it, {place}, {size}: {name}.",
    )
    return one(forms), name


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    images: int = 100_000
    steps: int = 4000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.05
    merges: int = 900
    embed: int = 128
    image_width: int = 96
    image_layers: int = 4
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


def draw_images(recipe: Recipe, path: Path, progress: Progress) -> npt.NDArray[np.int64]:
    """Draw the pretraining images into ``path`` and return their indices in the stream."""
    stream = glyphs.pretrain()
    rng = np.random.default_rng(seed_for(recipe.seed, "which images"))
    names = (*glyphs.CLASSNAMES, *glyphs.DIGITNAMES)
    keep = np.array([KEEP[d] for d in glyphs.DOMAINS])[stream.domains]
    keep[np.isin(stream.labels, [names.index(n) for n in HELD_OUT])] = 0
    chosen = (rng.random(len(stream)) < keep).nonzero()[0][: recipe.images]
    if not path.exists():
        part = path.with_suffix(".part")
        pixels = np.lib.format.open_memmap(
            part, mode="w+", dtype=np.uint8, shape=(len(chosen), glyphs.SIDE, glyphs.SIDE, 3)
        )
        for start in progress.track(range(0, len(chosen), 512), description="drawing"):
            pixels[start : start + 512] = stream.images(chosen[start : start + 512])
        pixels.flush()
        os.replace(part, path)
    return chosen


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


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm up linearly, then follow half a cosine to zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + float(np.cos(np.pi * share)))


def train(recipe: Recipe, work: Path, out: Path, progress: Progress) -> None:
    """Train, checkpoint every 100 steps, write the finished files."""
    from open_clip import SimpleTokenizer

    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_merges(out / "bpe.txt.gz", recipe.merges)
    tokenizer = SimpleTokenizer(bpe_path=str(out / "bpe.txt.gz"), context_length=77)
    config = model_config(recipe, tokenizer.vocab_size)
    chosen = draw_images(recipe, work / "images.npy", progress)
    pixels = np.load(work / "images.npy", mmap_mode="r", allow_pickle=False)
    stream = glyphs.pretrain()
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]

    torch.manual_seed(seed_for(recipe.seed, "weights"))
    model = build_tiny(config)
    wide = [p for p in model.parameters() if p.ndim >= 2]
    thin = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": wide, "weight_decay": recipe.weight_decay},
        {"params": thin, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    checkpoint = work / "checkpoint.safetensors"
    first = restore(checkpoint, model, optimiser) if checkpoint.exists() else 0
    bar = progress.add_task("training", total=recipe.steps, completed=first)
    for step in range(first, recipe.steps):
        rng = np.random.default_rng(seed_for(recipe.seed, "batch", step))
        rows = np.sort(rng.choice(len(chosen), recipe.batch, replace=False))
        worded = [caption(stream.attributes(int(i)), rng) for i in chosen[rows]]
        image = (torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2) / 255 - mean) / std
        f = F.normalize(torch.cat([model.visual(part) for part in image.split(64)]), dim=-1)
        g = encode_captions(model, tokenizer([text for text, _ in worded]))
        logits = model.logit_scale.exp() * f @ g.T
        words = np.array([word for _, word in worded])
        same = torch.from_numpy(words[:, None] == words[None, :])
        loss = (pull(logits, same) + pull(logits.T, same)) / 2
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        progress.update(bar, advance=1, description=f"training, loss {loss.item():.3f}")
        if (step + 1) % 100 == 0:
            right = same[torch.arange(len(rows)), logits.argmax(dim=-1)].float().mean().item()
            progress.console.print(
                f"step {step + 1}  loss {loss.item():.3f}  right word {right:.2f}"
            )
            save(checkpoint, model, optimiser, step + 1)
    # 16 bits halve the file; load_clip and the model card use the rounded weights
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    write_safetensors(state, out / "model.safetensors", {"recipe": json.dumps(recipe.__dict__)})
    preprocess = {"size": glyphs.SIDE, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write to a temporary name and rename."""
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    os.replace(part, path)


def save(path: Path, model: Any, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Checkpoint weights and moments."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": v for k, v in moments.items()}
    tensors["step"] = torch.tensor(step)
    write_safetensors({k: v.contiguous() for k, v in tensors.items()}, path, {})


def restore(path: Path, model: Any, optimiser: torch.optim.Optimizer) -> int:
    """Read a checkpoint of `save` back and return its step."""
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(tensors["step"])


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="checkpoints")
@click.option("--out", type=click.Path(path_type=Path), default=TINY, help="finished files")
@click.option("--steps", default=Recipe.steps, show_default=True)
@click.option("--images", default=Recipe.images, show_default=True)
@click.option("--seed", default=Recipe.seed, show_default=True)
def main(work: Path, out: Path, steps: int, images: int, seed: int) -> None:
    """Train the embedded CLIP."""
    with Progress() as progress:
        train(Recipe(seed=seed, steps=steps, images=images), work, out, progress)


if __name__ == "__main__":
    main()
