"""Score the embedded CLIP for its model card: ``python -m bench.tiny_card --out docs/tiny.json``.

Zero-shot with "a photo of a {class}.", a linear probe on image features of the training split, and
central CoOp with 16 shots, all on the test split of ``glyphs``; zero-shot on ``digits``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import fastfpl
from fastfpl.clip.captions import HELD_OUT, LOOK_ALIKES, RENAMED
from fastfpl.data import Split, load_dataset
from fastfpl.data.transforms import Preprocess


def encode(clip: fastfpl.FrozenCLIP, split: Split) -> np.ndarray:
    prepare = Preprocess(clip.image_size, clip.mean, clip.std)
    parts = np.array_split(np.arange(len(split)), max(1, len(split) // 256))
    return np.concatenate([clip.encode_image(prepare(split.images(p))).numpy() for p in parts])


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


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--epochs", default=50, show_default=True, help="of central CoOp")
@click.option("--lr", default=0.002, show_default=True, help="of central CoOp")
def main(out: Path, epochs: int, lr: float) -> None:
    from sklearn.linear_model import LogisticRegression

    clip = fastfpl.load_clip("tiny")
    card: dict[str, Any] = {"weights": clip.weights_digest}
    card["coop"] = f"{epochs} epochs, batch 32, SGD with learning rate {lr} and cosine"
    for name in ("glyphs", "digits"):
        dataset = load_dataset(name)
        train, test = encode(clip, dataset.train), encode(clip, dataset.test)
        classes = fastfpl.ClassPrompts(clip, dataset.classnames)
        text = fastfpl.encode_prompts(classes, classes.words("a photo of a")).numpy()
        right = (test @ text.T).argmax(axis=1) == dataset.test.labels
        probe = LogisticRegression(C=100.0, max_iter=2000).fit(train, dataset.train.labels)
        scores = {"zero-shot": right, "linear probe": probe.predict(test) == dataset.test.labels}
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
    out.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(card, indent=1))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
