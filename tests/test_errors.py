"""A mistyped name is told the one that was meant."""

import open_clip
import pytest

from fastfpl.config import Settings
from fastfpl.errors import near
from fastfpl.methods import METHODS

CLIPS = ("tiny", *open_clip.list_models())
DEVICES = ("auto", "cpu", "cuda")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("vit-b16", CLIPS, "ViT-B-16"),
        ("vitb32", CLIPS, "ViT-B-32"),
        ("ViT-B16", CLIPS, "ViT-B-16"),
        ("VIT_L_14_336", CLIPS, "ViT-L-14-336"),
        ("eva02-b16", CLIPS, "EVA02-B-16"),
        ("rn50", CLIPS, "RN50"),
        ("resnet50", CLIPS, "RN50"),
        ("tinny", CLIPS, "tiny"),
        ("gpu", DEVICES, "cuda"),
        ("GPU", DEVICES, "cuda"),
        ("cdua", DEVICES, "cuda"),
        ("PromptFL", METHODS, "promptfl"),
        ("fed-otp", METHODS, "fedotp"),
        ("pfedmop", METHODS, "pfedmoap"),
        ("epochs", Settings.model_fields, "local_epochs"),
        ("learning-rate", Settings.model_fields, "lr"),
        ("batchsize", Settings.model_fields, "batch_size"),
        ("memory", Settings.model_fields, "max_memory"),
        ("patch", ("patches", "pooled", "raw"), "patches"),
        ("cifar-100", ("cifar10", "cifar100", "food101"), "cifar100"),
        ("food", ("cifar10", "cifar100", "food101"), "food101"),
    ],
)
def test_the_nearest_name_comes_first(name, known, meant):
    assert near(name, known).startswith(f"; did you mean {meant!r}")


@pytest.mark.parametrize("name", ["", "--", "xyz", "\0", "\u00e9\u00e8", "x" * 1_000_000])
def test_what_resembles_nothing_gets_the_list(name):
    assert near(name, DEVICES) == "; known: auto, cpu, cuda"
