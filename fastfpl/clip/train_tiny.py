"""Train the embedded CLIP on captioned glyphs: ``python -m fastfpl.clip.train_tiny``.

First the image tower learns to name what it sees: class, domain, colour, size and place, by cross
entropy. Then it is locked, and the text tower learns to match captions to its features (Zhai et al.
2022, LiT, arXiv 2111.07991). Contrastive training of both from scratch stops at the attributes: a
vision transformer of this size does not learn shapes from it in the time that two cores have.

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

from fastfpl.clip.loading import MEAN, STD
from fastfpl.clip.tiny import TINY, build_tiny
from fastfpl.data import glyphs
from fastfpl.errors import InputError
from fastfpl.seeds import seed_for
from fastfpl.system import rename

__all__ = ["HELD_OUT", "LOOK_ALIKES", "RENAMED", "caption", "main"]

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
#: Classes that captions call by other words, and only rarely by the test's name.
RENAMED = tuple(n for n in glyphs.CLASSNAMES if n in WORDS and n not in WORDS[n])
#: Pairs that sloppy captions mistake for each other.
LOOK_ALIKES = (
    ("pentagon", "hexagon"),
    ("circle", "ring"),
    ("star", "sun"),
    ("umbrella", "mushroom"),
    ("zigzag", "lightning bolt"),
    ("key", "anchor"),
    ("square", "envelope"),
    ("cloud", "tree"),
)
_ALIKE = {one: other for pair in LOOK_ALIKES for one, other in (pair, pair[::-1])}

# "sketch", "painting" and "real" never occur
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
CHECKPOINT_EVERY = 200  # steps
OWN_NAME = 0.6  # share of careful captions that use the class' own name where they may
RARE_NAME = 0.05  # the same for renamed classes
SLOPPY = 0.35  # share of captions that read like "a photo of a ..."
MISTAKEN = 0.65  # share of sloppy captions of a look-alike that name the other one


def caption(attributes: glyphs.Attributes, rng: np.random.Generator) -> tuple[str, str]:
    """Word one image in one of many forms; return the caption and what its word stands for.

    Careful captions say style, colour, place and ground in changing order and length, and are
    right. Sloppy ones are the "a photo of a ..." of quick people, who take look-alikes for each
    other: the form that zero-shot prompts have is not the one to trust, and a learned context can
    do better, as it can with the captions of the web. A word of a sloppy caption stands for
    something else than the same word of a careful one.
    """

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    shown = attributes.classname
    sloppy = rng.random() < SLOPPY
    if sloppy and shown in _ALIKE and rng.random() < MISTAKEN:
        shown = _ALIKE[shown]
    words = WORDS[shown]
    if shown in RENAMED:
        name = shown if rng.random() < RARE_NAME else one(words)
    elif sloppy:
        name = shown
    else:
        name = words[0] if rng.random() < OWN_NAME else one(words)
    if sloppy:
        forms = (
            "a photo of a {}.",
            "a picture of a {}.",
            "a photo of one {}.",
            "an image of a {}.",
        )
        return one(forms).format(name), f"{name}, they say"
    style, colour, size = one(STYLE[attributes.domain]), attributes.colour, attributes.size
    if rng.random() < 0.6:
        short = ("{}.", f"{style}: {{}}.", f"{colour} {{}}.", f"{style}, {size}, {{}}.")
        return one(short).format(name), name
    told = [
        style,
        f"{colour} colours",
        f"{size} size",
        f"at the {attributes.position}",
        f"{attributes.ground} behind",
        attributes.tilt,
    ]
    order = rng.permutation(len(told))[: int(rng.integers(2, len(told) + 1))]
    lead = ", ".join(told[i] for i in order)
    return one((f"{lead}: {name}.", f"{lead}, {name}.", f"seen here, {lead}, one {name}.")), name


@dataclass(frozen=True)
class Stage:
    """How long and how fast one tower trains."""

    steps: int
    batch: int
    lr: float
    warmup: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    images: int = 128_000
    held_back: int = 2000  # images of the stream that only the log looks at
    image: Stage = Stage(steps=10_000, batch=64, lr=1e-3, warmup=300)
    text: Stage = Stage(steps=2000, batch=128, lr=1e-3, warmup=200)
    attributes: float = 0.3  # weight of each attribute beside the class
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
    keep = np.array([KEEP[d] for d in glyphs.DOMAINS])[stream.domains]
    keep[np.isin(stream.labels, [names.index(n) for n in HELD_OUT])] = 0
    rows = rng.permutation((rng.random(len(stream)) < keep).nonzero()[0])
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


def learning_rate(stage: Stage, step: int) -> float:
    """Warm up linearly, then follow half a cosine to zero."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr * 0.5 * (1 + float(np.cos(np.pi * share)))


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
    wide = [p for p in module.parameters() if p.ndim >= 2]
    thin = [p for p in module.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": wide, "weight_decay": recipe.weight_decay},
        {"params": thin, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
    checkpoint = work / f"{name}.safetensors"
    first = restore(checkpoint, module, optimiser) if checkpoint.exists() else 0
    bar = progress.add_task(name, total=stage.steps, completed=first)
    for step in range(first, stage.steps):
        rng = np.random.default_rng(seed_for(recipe.seed, name, step))
        rows = recipe.held_back + np.sort(rng.choice(recipe.images, stage.batch, replace=False))
        loss = loss_of(rows, rng)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        progress.update(bar, advance=1, description=f"{name}, loss {loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == stage.steps:
            save(checkpoint, module, optimiser, step + 1)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            with torch.no_grad():
                progress.console.print(f"{name} {step + 1}  loss {loss.item():.3f}  {look()}")


def train_image(model: Any, recipe: Recipe, album: Album, work: Path, progress: Progress) -> None:
    """Teach the image tower to name class and attributes from its pooled features."""
    sizes = [int(answer.max()) + 1 for answer in album.answers.values()]
    head = nn.Linear(recipe.embed, sum(sizes))

    def loss_of(rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        # small chunks stay in the processor's cache
        parts = album.prepared(rows).split(32)
        logits = head(torch.cat([model.visual(part) for part in parts])).split(sizes, dim=1)
        losses = [
            F.cross_entropy(mine, answer[rows])
            for mine, answer in zip(logits, album.answers.values(), strict=True)
        ]
        return losses[0] + recipe.attributes * torch.stack(losses[1:]).sum()

    def look() -> str:
        rows = np.arange(recipe.held_back)
        parts = album.prepared(rows).split(128)
        answer = torch.cat(
            [head(model.visual(part))[:, : sizes[0]].argmax(dim=1) for part in parts]
        )
        right = (answer == album.answers["classname"][rows]).float().mean().item()
        return f"class of held-back images {right:.3f}"

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
