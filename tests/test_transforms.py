"""From pixels to the input of an image tower."""

import builtins
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as old
from torchvision.transforms.v2 import functional

import fastfpl.data.transforms as transforms_module
from fastfpl.data.transforms import Preprocess, _Distortion, _distortion, _window
from fastfpl.errors import InputError, KindError, Missing
from tests.warm import warm_python

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP = Preprocess(32, MEAN, STD)
PLAIN = Preprocess(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def picture(height, width, seed=0):
    """Draw smooth waves with an edge, so that resizing and cropping show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(rng.uniform(3, 9) * x + rng.uniform(3, 9) * y + c) for c in range(3)]
    image = np.stack(waves, axis=2) * 100 + 128
    image[height // 3 :, width // 4 :] *= 0.6
    return image.astype(np.uint8)


def levels(batch):
    return (batch * 255).round().to(torch.int64)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (60, 45), (41, 97), (20, 13), (32, 50)])
def test_preprocess_equals_the_pillow_pipeline(height, width):
    image = picture(height, width)
    theirs = transforms.Compose(
        [
            transforms.Resize(32, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(Image.fromarray(image))
    ours = CLIP([image])
    assert ours.shape == (1, 3, 32, 32)
    assert ours.dtype == torch.float32
    # two roundings of an 8-bit level (Pillow rounds between its passes too)
    assert float((ours[0] - theirs).abs().max()) <= 1.01 / 255 / min(STD)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = picture(32, 32)
    np.testing.assert_array_equal(levels(PLAIN([image]))[0].permute(1, 2, 0).numpy(), image)


def test_values_are_normalised_per_channel():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[..., 1] = 255
    expected = torch.tensor([(0 - MEAN[0]) / STD[0], (1 - MEAN[1]) / STD[1], -MEAN[2] / STD[2]])
    torch.testing.assert_close(CLIP([image])[0, :, 5, 7], expected)


def test_no_image_influences_another_one():
    images = [picture(50, 40, 1), picture(32, 32, 2), picture(90, 33, 3)]
    seeds = [4, 5, 6]
    batch, augmented = CLIP(images), CLIP.augmented(images, seeds)
    for k, image in enumerate(images):
        assert torch.equal(batch[k], CLIP([image])[0])
        assert torch.equal(augmented[k], CLIP.augmented([image], [seeds[k]])[0])
    assert torch.equal(CLIP.augmented(images[::-1], seeds[::-1]), augmented.flip(0))


def test_a_stacked_array_is_a_sequence_of_images():
    stack = np.stack([picture(48, 48, k) for k in range(3)])
    assert torch.equal(CLIP(stack), CLIP(list(stack)))
    assert torch.equal(CLIP.augmented(stack, np.arange(3)), CLIP.augmented(list(stack), [0, 1, 2]))


def test_no_images_make_an_empty_batch():
    assert CLIP([]).shape == (0, 3, 32, 32)
    assert CLIP.augmented([], []).shape == (0, 3, 32, 32)


def test_the_images_stay_as_they_are_and_may_be_read_only_or_reversed():
    image = picture(32, 32)
    kept = image.copy()
    image.flags.writeable = False
    CLIP.augmented([image], [0])
    out = PLAIN([image, image[:, ::-1]])
    out.zero_()
    np.testing.assert_array_equal(image, kept)


def test_augmented_draws_from_its_seeds_only():
    image = picture(64, 64)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = CLIP.augmented([image] * 3, [0, 1, 0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first, CLIP.augmented([image] * 3, [0, 1, 0]))
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


def test_a_flip_is_a_mirror_image_of_the_same_window():
    image = picture(64, 80)
    seeds = list(range(8))
    never = CLIP.augmented([image] * 8, seeds, flip=0.0)
    always = CLIP.augmented([image] * 8, seeds, flip=1.0)
    assert torch.equal(always, never.flip(3))
    assert not torch.equal(always, never)


def test_about_half_of_the_images_are_flipped():
    image = picture(32, 32)
    seeds = list(range(400))
    flat = {"scale": (1.0, 1.0)}
    half = CLIP.augmented([image] * 400, seeds, **flat)
    never = CLIP.augmented([image] * 400, seeds, **flat, flip=0.0)
    flipped = (half != never).flatten(1).any(1).sum()
    # 200 expected, standard deviation 10
    assert 160 < int(flipped) < 240


def test_a_window_is_cut_and_resized_like_pillow_does():
    image = picture(80, 64)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rng.random()
        top, left, height, width = _window(80, 64, (0.08, 1.0), rng)
        cut = Image.fromarray(image[top : top + height, left : left + width])
        theirs = np.asarray(cut.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.int64)
        ours = levels(PLAIN.augmented([image], [seed], flip=0.0))[0].permute(1, 2, 0).numpy()
        assert abs(ours - theirs).max() <= 1


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(0.01, 1.0),
    st.integers(0, 2**32),
)
def test_windows_lie_inside(height, width, low, seed):
    rng = np.random.default_rng(seed)
    top, left, h, w = _window(height, width, (low, 1.0), rng)
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


def test_windows_have_the_area_and_shape_that_were_asked_for():
    rng = np.random.default_rng(0)
    windows = np.array([_window(400, 400, (0.2, 0.5), rng) for _ in range(2000)])
    area = windows[:, 2] * windows[:, 3] / 400**2
    ratio = windows[:, 3] / windows[:, 2]
    # sides are rounded to pixels of 1/400
    assert 0.198 < area.min() < 0.21
    assert 0.49 < area.max() < 0.503
    assert abs(area.mean() - 0.35) < 0.01
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.02  # log-uniform, hence symmetric
    assert windows[:, 0].min() < 5
    assert windows[:, 1].min() < 5


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 10), (143, 0, 13, 10)),
        ((10, 300), (0, 143, 10, 13)),
        ((40, 40), (0, 0, 40, 40)),
    ],
)
def test_where_no_window_fits_the_largest_centred_one_is_taken(size, expected):
    class Worst(np.random.Generator):
        """Draw whole areas and a ratio that never fits a square."""

        def uniform(self, low, high):
            return high

    assert _window(*size, (1.0, 1.0), Worst(np.random.PCG64(0))) == expected


@pytest.mark.parametrize(
    ("image", "error", "rest"),
    [
        (np.zeros((8, 8, 3)), KindError, "image 1 must be uint8; got float64"),
        (np.zeros((8, 8), np.uint8), InputError, r"image 1 must have shape .* got \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), InputError, r"image 1 .* got \(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), InputError, r"image 1 .* got \(0, 8, 3\)"),
    ],
)
def test_what_is_no_image_is_refused(image, error, rest):
    images = [picture(32, 32), image]
    with pytest.raises(error, match=rest):
        CLIP(images)
    with pytest.raises(error, match=rest):
        CLIP.augmented(images, [0, 1])


@pytest.mark.parametrize(
    ("seeds", "options", "rest"),
    [
        ([0, 1], {}, "seeds must be one per image; got 2 with 1 images"),
        ([-3], {}, "seeds must not be negative; got -3"),
        ([0], {"scale": (0.0, 1.0)}, "scale must satisfy"),
        ([0], {"scale": (0.5, 0.4)}, r"scale must satisfy .* got \(0.5, 0.4\)"),
        ([0], {"scale": (0.5, 1.1)}, "scale must satisfy"),
        ([0], {"flip": 1.5}, r"flip must lie in \[0, 1\]; got 1.5"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(seeds, options, rest):
    with pytest.raises(InputError, match=rest):
        CLIP.augmented([picture(32, 32)], seeds, **options)


# --- the strong view ------------------------------------------------------------------------------


def drawn_for(**wanted):
    """Find a seed whose strong view mirrors, jitters, greys and blurs as asked."""
    for seed in range(2000):
        d = _distortion(np.random.default_rng(seed))
        have = {
            "mirrored": d.mirrored,
            "jitter": bool(d.jitter),
            "grey": d.grey,
            "blur": d.sigma is not None,
        }
        if all(have[k] == wanted.get(k, False) for k in have):
            return seed, d
    raise AssertionError(wanted)


def by_torchvision(image, drawn):
    """Distort with torchvision's older functional forms on Pillow images, blur on a tensor."""
    pil = Image.fromarray(image)
    pil = old.resize(pil, [32, 32])  # bilinear is torchvision's default
    if drawn.mirrored:
        pil = old.hflip(pil)
    for name, factor in drawn.jitter:
        pil = getattr(old, f"adjust_{name}")(pil, factor)
    if drawn.grey:
        pil = old.rgb_to_grayscale(pil, num_output_channels=3)
    if drawn.sigma is not None:
        pil = old.gaussian_blur(pil, 3, drawn.sigma)
    return old.normalize(old.to_tensor(pil), MEAN, STD)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"mirrored": True},
        {"jitter": True},
        {"grey": True},
        {"blur": True},
        {"mirrored": True, "jitter": True, "grey": True, "blur": True},
    ],
    ids=lambda wanted: "-".join(wanted) or "nothing",
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (70, 45)])
def test_strong_equals_torchvision(wanted, height, width):
    image = picture(height, width)
    seed, drawn = drawn_for(**wanted)
    ours, theirs = CLIP.strong([image], [seed])[0], by_torchvision(image, drawn)
    off = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # Pillow rounds after every step, and keeps hue and saturation in 8 bits
    assert float(off.max()) <= (40 if drawn.jitter else 1.01)
    assert float(off.mean()) <= (2.5 if drawn.jitter else 0.6)
    plain = CLIP.strong([image], [drawn_for()[0]])[0]
    assert torch.equal(ours, plain) == (not wanted)


def test_each_change_of_the_jitter_equals_torchvision(monkeypatch):
    image = picture(32, 32)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    for order in itertools.permutations([("brightness", 0.7), ("contrast", 1.6), ("hue", -0.15)]):
        jitter = (*order, ("saturation", 0.3))
        monkeypatch.setattr(
            transforms_module,
            "_distortion",
            lambda rng, j=jitter: _Distortion(False, j, False, None),
        )
        theirs = pixels
        for name, factor in jitter:
            theirs = getattr(old, f"adjust_{name}")(theirs, factor)
        # the older tensor forms floor where the newer ones do: at most two levels, each step
        off = (levels(PLAIN.strong([image], [0]))[0] - theirs.to(torch.int64)).abs()
        assert int(off.max()) <= 4
        assert float(off.float().mean()) < 0.5


def test_strong_views_are_drawn_as_published():
    drawn = [_distortion(np.random.default_rng(seed)) for seed in range(4000)]
    # standard deviations of the shares are below 0.008
    assert abs(np.mean([d.mirrored for d in drawn]) - 0.5) < 0.03
    assert abs(np.mean([bool(d.jitter) for d in drawn]) - 0.8) < 0.03
    assert abs(np.mean([d.grey for d in drawn]) - 0.2) < 0.03
    assert abs(np.mean([d.sigma is not None for d in drawn]) - 0.2) < 0.03
    together = [d.mirrored and d.grey and bool(d.jitter) and d.sigma is not None for d in drawn]
    assert abs(np.mean(together) - 0.5 * 0.8 * 0.2 * 0.2) < 0.006
    sigma = np.array([d.sigma for d in drawn if d.sigma is not None])
    assert 1 <= sigma.min() < 1.02
    assert 1.98 < sigma.max() <= 2
    jitter = [dict(d.jitter) for d in drawn if d.jitter]
    for name, low, high in (
        ("brightness", 0.2, 1.8),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.2, 1.8),
        ("hue", -0.2, 0.2),
    ):
        factors = np.array([j[name] for j in jitter])
        span = high - low
        assert low <= factors.min() < low + 0.01 * span
        assert high - 0.01 * span < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.03 * span
    orders = [tuple(name for name, _ in d.jitter) for d in drawn if d.jitter]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    # 24 orders of about 133 each
    assert len(counts) == 24
    assert counts.min() > 80
    assert counts.max() < 190


def test_strong_views_draw_from_their_seeds_only():
    images = [picture(50, 40, 1), picture(32, 32, 2), picture(90, 33, 3)]
    seeds = [4, 5, 6]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batch = CLIP.strong(images, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.shape == (3, 3, 32, 32)
    assert batch.dtype == torch.float32
    for k, image in enumerate(images):
        assert torch.equal(batch[k], CLIP.strong([image], [seeds[k]])[0])
    assert torch.equal(CLIP.strong(images[::-1], seeds[::-1]), batch.flip(0))
    assert not torch.equal(CLIP.strong(images[:1] * 2, [1, 2])[0], CLIP.strong(images[:1], [2])[0])
    assert CLIP.strong([], []).shape == (0, 3, 32, 32)


def test_a_strong_view_leaves_the_image_as_it_is():
    image = picture(32, 32)
    kept = image.copy()
    image.flags.writeable = False
    CLIP.strong([image] * 20, range(20))
    np.testing.assert_array_equal(image, kept)


def test_strong_views_refuse_what_makes_no_sense():
    with pytest.raises(InputError, match=r"strong: seeds must be one per image; got 2 with 1"):
        CLIP.strong([picture(32, 32)], [0, 1])
    with pytest.raises(InputError, match=r"strong: seeds must not be negative; got -1"):
        CLIP.strong([picture(32, 32)], [-1])
    with pytest.raises(KindError, match="image 0 must be uint8; got float64"):
        CLIP.strong([np.zeros((8, 8, 3))], [0])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="size must be positive; got 0"):
        Preprocess(0, MEAN, STD)
    with pytest.raises(InputError, match="mean and std must be 3 values, std positive"):
        Preprocess(32, MEAN, (1.0, 0.0, 1.0))


def test_a_missing_torchvision_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(Missing, match=r"got ModuleNotFoundError: .*pip install --upgrade torch"):
        CLIP([picture(32, 32)])


def test_a_torchvision_of_another_torch_names_the_cure(monkeypatch):
    real = builtins.__import__

    def broken(name, *rest):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(Missing, match=rf"torch {re.escape(torch.__version__)}; got Runtime.*nms"):
        CLIP([picture(32, 32)])


# --- images that are much longer than wide --------------------------------------------------------


def plainly(image, size=32):
    """Resize all of an image and cut its centre, as torchvision does; squeeze it as it does."""
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    middle = (
        pixels if min(image.shape[:2]) == size else functional.resize(pixels, [size], **bicubic)
    )
    bilinear = {"interpolation": InterpolationMode.BILINEAR, "antialias": True}
    return functional.center_crop(middle, [size, size]), functional.resize(
        pixels, [size, size], **bilinear
    )


@pytest.mark.parametrize(
    "shape", [(61, 45), (45, 61), (20, 13), (32, 50), (640, 10), (10, 640), (64, 1), (32, 4000)]
)
def test_ordinary_images_are_those_of_torchvision_bit_for_bit(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    middle, squeezed = plainly(image)
    assert torch.equal(PLAIN.squares([image])[0], middle)
    assert torch.equal(PLAIN.distorted([image], [drawn_for()[0]])[0], squeezed)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("shape", [(300, 4), (3001, 7), (97, 1), (3000, 31), (9000, 130)])
def test_long_images_are_those_of_torchvision_to_a_level(shape, noise):
    for height, width in (shape, shape[::-1]):
        image = picture(height, width)
        if noise:
            image = np.random.default_rng(1).integers(0, 256, image.shape, dtype=np.uint8)
        middle, squeezed = plainly(image)
        off = (PLAIN.squares([image])[0].int() - middle.int()).abs()
        assert int(off.max()) <= 1
        assert float(off.float().mean()) <= 0.02
        # the other axis comes first, and each is rounded
        off = (PLAIN.distorted([image], [drawn_for()[0]])[0].int() - squeezed.int()).abs()
        assert int(off.max()) <= 2
        assert float(off.float().mean()) <= 0.25  # one rounding more of noise


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets limits as Linux does")
def test_no_view_of_a_line_of_two_million_pixels_takes_memory(tmp_path):
    for name, size in (("upright", (1, 2_000_000)), ("lying", (2_000_000, 1))):
        Image.new("RGB", size, (9, 99, 199)).save(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size < 40_000
    # beyond what small views have taken: the line itself is 6 MB, all of it resized 15 GB and more
    code = f"""
import resource
from pathlib import Path
from fastfpl.data.listing import decode
from fastfpl.data.transforms import Preprocess
plain = Preprocess(224, (0, 0, 0), (1, 1, 1))
views = (plain.squares, lambda images: plain.crops(images, [5]),
    lambda images: plain.distorted(images, [5]))
for place in (None, "upright", "lying"):
    image = decode(Path({str(tmp_path)!r}) / f"{{place or 'lying'}}.png")
    for view in views:
        out = view([image if place else image[:50, :50]])
        assert out.shape == (1, 3, 224, 224)
        if view is not views[2]:
            assert out.amax(dim=(0, 2, 3)).tolist() == [9, 99, 199]
    if place is None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (300 << 20),) * 2)
"""
    subprocess.run([*warm_python(), "-c", code], check=True, timeout=120)
