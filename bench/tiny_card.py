"""Score the embedded CLIP for its model card: ``python -m bench.tiny_card``.

Zero-shot with "a photo of a {class}." by the pooled feature and by the mean of the patches', a
linear probe on image features of the training split, and central CoOp with 16 shots, all on the
test splits of ``glyphs`` and ``digits``. The probe's strength is chosen on a fifth of the training
split that it is not fitted to, as Radford et al. 2021 (arXiv 2103.00020) choose it. Writes
``docs/tiny.json`` and the tables of ``docs/tiny.md`` between its markers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn import functional as F

import fastfpl
from bench.kept import between
from fastfpl.clip.captions import HELD_OUT, LOOK_ALIKES, RENAMED
from fastfpl.data import Split, glyphs, load_dataset
from fastfpl.data.transforms import Preprocess
from fastfpl.files import write_json

DOCS = Path(__file__).parent.parent / "docs"
#: Inverse strengths of the probe's regularisation that are tried.
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def encode(clip: fastfpl.FrozenCLIP, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Give pooled features and the means of the patches', (n, dim) each, of length 1."""
    prepare = Preprocess(clip.image_size, clip.mean, clip.std)
    pooled, patches = [], []
    for rows in np.array_split(np.arange(len(split)), max(1, len(split) // 256)):
        pixels = prepare(split.images(rows))
        pooled.append(clip.encode_image(pixels))
        patches.append(F.normalize(clip.encode_image_tokens(pixels).mean(dim=1), dim=-1))
    return torch.cat(pooled).numpy(), torch.cat(patches).numpy()


def probe(features: np.ndarray, labels: np.ndarray) -> Any:
    """Fit logistic regression; its strength names the most of a fifth that is left out."""
    from sklearn.linear_model import LogisticRegression

    def fitted(strength: float, rows: np.ndarray) -> Any:
        model = LogisticRegression(C=strength, max_iter=2000)
        return model.fit(features[rows], labels[rows])

    order = np.random.default_rng(0).permutation(len(labels))
    asked, learned = np.split(order, [len(order) // 5])
    found = {c: fitted(c, learned).score(features[asked], labels[asked]) for c in STRENGTHS}
    return fitted(max(found, key=lambda c: found[c]), order)


def per_group(right: np.ndarray, dataset: Any) -> dict[str, float]:
    labels, domains = dataset.test.labels, dataset.test.domains
    names = np.array(dataset.classnames)[labels]
    half = (len(dataset.classnames) + 1) // 2
    groups = {"all": np.ones(len(labels), dtype=bool)}
    groups |= {name: domains == d for d, name in enumerate(dataset.domains)}
    groups |= {"first half": labels < half, "second half": labels >= half}
    groups |= {"held out": np.isin(names, HELD_OUT), "renamed": np.isin(names, RENAMED)}
    groups["look-alikes"] = np.isin(names, [name for pair in LOOK_ALIKES for name in pair])
    rest = groups["held out"] | groups["renamed"] | groups["look-alikes"]
    groups["seen by name"] = ~rest
    return {name: round(float(right[rows].mean()), 4) for name, rows in groups.items()}


#: Rows of the page's table, by their names in the card.
ROWS = {
    "all": "all six domains",
    **{name: name for name in glyphs.DOMAINS},
    "first half": "base classes (first 24), scored over all 48",
    "second half": "novel classes (last 24), scored over all 48",
    "seen by name": "15 classes that are named and no look-alikes",
    "look-alikes": "16 look-alikes",
    "renamed": "10 classes that captions mostly call by other words",
    "held out": "7 classes without a pretraining image",
}
KINDS = ("zero-shot", "zero-shot by patches", "linear probe")


def page(card: dict[str, Any]) -> str:
    """Write the card's tables in Markdown, in per cent."""
    found, digits = card["glyphs"], card["digits"]
    lines = [f"| `glyphs` | {' | '.join(KINDS)} |", "|:--" + "|--:" * len(KINDS) + "|"]
    for name, title in ROWS.items():
        cells = [f"{100 * found[kind][name]:.1f}" for kind in KINDS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    among = [
        f"{100 * found['zero-shot'][f'{part} classes among themselves']:.1f}"
        for part in ("base", "novel")
    ]
    coop, zero = found["central CoOp, 16 shots"], found["zero-shot"]["all"]
    lines += [
        "",
        f"- Zero-shot, base among themselves {among[0]}, novel among themselves {among[1]}.",
        f"- Central CoOp, 16 context vectors, 16 shots a class, {card['coop']}: "
        f"**{100 * coop:.1f}**, {100 * (coop - zero):+.1f} points over zero-shot.",
        f"- `digits`, 599 test images: zero-shot {100 * digits['zero-shot']:.1f}, linear probe "
        f"{100 * digits['linear probe']:.1f}, central CoOp "
        f"{100 * digits['central CoOp, 16 shots']:.1f}.",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--epochs", default=30, show_default=True, help="of central CoOp")
@click.option("--lr", default=0.002, show_default=True, help="of central CoOp")
def main(epochs: int, lr: float) -> None:
    clip = fastfpl.load_clip("tiny")
    card: dict[str, Any] = {"weights": clip.weights_digest}
    card["coop"] = f"{epochs} epochs, batch 32, SGD with learning rate {lr} and cosine"
    for name in ("glyphs", "digits"):
        dataset = load_dataset(name)
        train, _ = encode(clip, dataset.train)
        test, patches = encode(clip, dataset.test)
        classes = fastfpl.ClassPrompts(clip, dataset.classnames)
        text = fastfpl.encode_prompts(classes, classes.words("a photo of a")).numpy()
        linear = probe(train, dataset.train.labels)
        answers = {
            "zero-shot": (test @ text.T).argmax(axis=1),
            "zero-shot by patches": (patches @ text.T).argmax(axis=1),
            "linear probe": linear.predict(test),
        }
        scores = {kind: answer == dataset.test.labels for kind, answer in answers.items()}
        if name == "glyphs":
            card[name] = {kind: per_group(r, dataset) for kind, r in scores.items()}
            half = (len(dataset.classnames) + 1) // 2
            for part, rows, columns in (
                ("base classes among themselves", dataset.test.labels < half, slice(0, half)),
                ("novel classes among themselves", dataset.test.labels >= half, slice(half, None)),
            ):
                answer = (test[rows] @ text[columns].T).argmax(axis=1) + (columns.start or 0)
                card[name]["zero-shot"][part] = round(
                    float((answer == dataset.test.labels[rows]).mean()), 4
                )
        else:
            card[name] = {kind: round(float(r.mean()), 4) for kind, r in scores.items()}
        card[name]["inverse strength of the probe"] = linear.C
        coop = fastfpl.run(
            "local",
            dataset=name,
            clients=1,
            partition="iid",
            shots=16,
            rounds=1,
            local_epochs=epochs,
            batch_size=32,
            lr=lr,
            schedule="cosine",
        )
        card[name]["central CoOp, 16 shots"] = round(coop.final["accuracy"], 4)
    write_json(DOCS / "tiny.json", card)
    between(DOCS / "tiny.md", "card", page(card))
    click.echo(json.dumps(card, indent=1))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
