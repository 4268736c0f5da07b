"""How fast images of `glyphs` are drawn, domains mixed as in training."""

import numpy as np

from fastfpl.data.glyphs import pretrain

N = 512


def bench_images(benchmark):
    split = pretrain()
    indices = np.random.default_rng(0).permutation(len(split))[:N]
    # the atlas is built with the first image; a batch drawn twice must be the same
    first = split.images(indices)
    drawn = benchmark(split.images, indices)
    assert np.array_equal(first, drawn)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["images_per_s"] = round(N / benchmark.stats.stats.median)
