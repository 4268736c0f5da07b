from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from fastfpl.clip import train_tiny
from fastfpl.clip.captions import HELD_OUT, LOOK_ALIKES, RENAMED, WORDS, caption
from fastfpl.clip.tiny import build_tiny
from fastfpl.clip.train_tiny import Recipe, Stage
from fastfpl.data import glyphs
from fastfpl.errors import InputError

SMALL = Recipe(
    images=96,
    held_back=32,
    image=Stage(steps=5, batch=8, lr=1e-3, warmup=2, muon=2e-3),
    text=Stage(steps=5, batch=8, lr=1e-3, warmup=2),
    image_layers=1,
    text_layers=1,
)


def told(count: int) -> list[tuple[glyphs.Attributes, str, str]]:
    stream, rng = glyphs.pretrain(), np.random.default_rng(5)
    names = (*glyphs.CLASSNAMES, *glyphs.DIGITNAMES)
    shown = np.flatnonzero(~np.isin(stream.labels, [names.index(n) for n in HELD_OUT]))
    out = []
    for index in rng.choice(shown, count):
        attributes = stream.attributes(int(index))
        out.append((attributes, *caption(attributes, rng)))
    return out


def test_no_caption_has_a_held_out_class_or_domain_word():
    text = " ".join(sentence for _, sentence, _ in told(3000))
    for word in (*HELD_OUT, "sketch", "painting", "real "):
        assert word not in text


def test_sloppy_captions_mistake_look_alikes_and_careful_ones_do_not():
    other = {a: b for pair in LOOK_ALIKES for a, b in (pair, pair[::-1])}
    sloppy = [(a, s, w) for a, s, w in told(6000) if w.endswith(", they say")]
    careful = [(a, s, w) for a, s, w in told(6000) if not w.endswith(", they say")]
    assert len(sloppy) / 6000 == pytest.approx(0.35, abs=0.03)
    alike = [(a, w.removesuffix(", they say")) for a, _, w in sloppy if a.classname in other]
    wrong = [w in (other[a.classname], *WORDS[other[a.classname]]) for a, w in alike]
    assert np.mean(wrong) == pytest.approx(0.65, abs=0.05)
    assert all(w in (a.classname, *WORDS[a.classname]) for a, _, w in careful)
    renamed = [w == a.classname for a, _, w in careful if a.classname in RENAMED]
    assert 0.02 < np.mean(renamed) < 0.09


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(train_tiny, "CHECKPOINT_EVERY", 2)
    whole, parts = (tmp_path / name / "out" for name in ("whole", "parts"))
    with Progress(disable=True) as progress:
        train_tiny.train(SMALL, whole.parent / "work", whole, progress)
        rate = train_tiny.pace
        calls = 0

        def stop(stage: Stage, step: int) -> float:
            nonlocal calls
            calls += 1
            if calls in (4, 11):  # in the image stage, then in the text stage
                raise KeyboardInterrupt
            return rate(stage, step)

        monkeypatch.setattr(train_tiny, "pace", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train_tiny.train(SMALL, parts.parent / "work", parts, progress)
        train_tiny.train(SMALL, parts.parent / "work", parts, progress)
    one, other = (load_file(p / "model.safetensors") for p in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert (whole / "config.json").read_text() == (parts / "config.json").read_text()
    # both towers have moved
    start = load_file(whole / "model.safetensors")
    untrained = replace(SMALL, image=replace(SMALL.image, steps=0), text=Stage(0, 8, 1e-3, 2))
    with Progress(disable=True) as progress:
        train_tiny.train(untrained, tmp_path / "w0", tmp_path / "o0", progress)
    first = load_file(tmp_path / "o0" / "model.safetensors")
    for name in ("visual.proj", "text_projection", "token_embedding.weight"):
        assert not torch.equal(first[name], start[name])


def small_tower(width=32):
    torch.manual_seed(0)
    recipe = replace(SMALL, image_width=width)
    return build_tiny(train_tiny.model_config(recipe, 600)).visual


def test_patches_and_pooled_feature_are_those_of_the_tower():
    visual = small_tower().eval()
    pixels = torch.randn(3, 3, 28, 28)
    pooled, patches = train_tiny.image_and_patches(visual, pixels)
    torch.testing.assert_close(pooled, visual(pixels))
    visual.output_tokens = True
    torch.testing.assert_close(patches, visual(pixels)[1] @ visual.proj)


def test_attention_starts_with_keys_near_queries_and_values_against_the_stream():
    visual = small_tower(width=64)
    train_tiny.start_like_a_trained_one(visual, torch.Generator().manual_seed(1))
    for block in visual.transformer.resblocks:
        queries, keys, values = block.attn.in_proj_weight.detach().split(64)
        heads = [slice(0, 32), slice(32, 64)]
        for rows in heads:
            product = queries[rows].T @ keys[rows]
            assert torch.linalg.matrix_rank(product) == 32
            assert product.diagonal().mean() > 0.3
        through = block.attn.out_proj.weight.detach() @ values
        assert through.diagonal().mean() == pytest.approx(-0.4, abs=0.05)
        off = through - torch.diag(through.diagonal())
        assert off.std() == pytest.approx(0.4 / 8, rel=0.1)


def test_muon_moves_the_matrices_of_blocks_and_adamw_all_else():
    module = torch.nn.ModuleList([small_tower(), torch.nn.Linear(128, 9)])
    adamw, muon = train_tiny.optimisers_of(module, SMALL.image, 0.05)
    mine, rest = (
        {id(p) for group in o.param_groups for p in group["params"]} for o in (muon, adamw)
    )
    blocks = dict(module[0].transformer.named_parameters())
    assert mine == {id(p) for p in blocks.values() if p.ndim == 2}
    assert not mine & rest
    assert mine | rest == {id(p) for p in module.parameters()}
    (alone,) = train_tiny.optimisers_of(module, SMALL.text, 0.05)
    assert isinstance(alone, torch.optim.AdamW)


def test_muon_is_the_one_of_torch():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((24, 8), (8, 24), (24, 8), (8, 8))]
    sides = [[torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2)]
    ours = train_tiny.Muon(sides[0], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(sides[1], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(*sides, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, other, start in zip(*sides, starts, strict=True):
        moved = (one - start).norm()
        assert (one - other).norm() < 0.03 * moved  # theirs multiplies in bfloat16


def test_more_images_than_the_stream_has_are_refused(tmp_path):
    with (
        Progress(disable=True) as progress,
        pytest.raises(InputError, match="images must be from 1 to the stream's"),
    ):
        train_tiny.train(replace(SMALL, images=10**7), tmp_path, tmp_path, progress)


def test_the_shipped_weights_say_how_they_were_trained():
    import json

    from safetensors import safe_open

    from fastfpl.clip.tiny import tiny_weights

    with safe_open(tiny_weights(), framework="pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    default = Recipe()
    assert recipe["image"] == default.image.__dict__
    assert recipe["text"] == default.text.__dict__
    assert recipe["images"] == default.images
    assert recipe["seed"] == default.seed
    assert tiny_weights().stat().st_size < 4 * 2**20
