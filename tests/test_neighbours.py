"""Kernel distance and manifold measures: equal to the reference packages, with intervals as wide as the truth."""

import numpy as np
import pytest
import torch

from visbio_diffusers.evaluation import neighbours


def _normal(seed, n, shift=0.0, dim=6):
    return shift + np.random.default_rng(seed).normal(size=(n, dim))


def test_kernel_distance_equals_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = _normal(0, 60), _normal(1, 60, 0.3)
    expected = float(kid.poly_mmd(torch.tensor(x), torch.tensor(y)))
    assert neighbours.kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [neighbours.kernel_distance(_normal(seed, 100), _normal(seed + 500, 100)) for seed in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(40)
    assert neighbours.kernel_distance(_normal(0, 100, 1.0), _normal(1, 100)) > 10 * np.std(same)


def test_manifold_measures_equal_prdc(capsys):
    prdc = pytest.importorskip("prdc")
    fake, real = _normal(0, 150, 0.5), _normal(1, 120)
    ours = neighbours.manifold_measures(fake, real, nearest_k=5)
    assert ours == pytest.approx(prdc.compute_prdc(real, fake, nearest_k=5))
    assert set(ours) == set(neighbours.MANIFOLD_MEASURES)


def test_collapsed_images_keep_precision_and_lose_recall():
    real = _normal(1, 300)
    varied = neighbours.manifold_measures(_normal(0, 300), real)
    collapsed = neighbours.manifold_measures(real[:10].repeat(30, axis=0) + _normal(2, 300) * 1e-3, real)
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.1 < 0.5 < varied["recall"]
    assert collapsed["coverage"] < 0.3 < 0.7 < varied["coverage"]


@pytest.mark.parametrize("measure", ["kernel", "recall", "density", "coverage"])
def test_intervals_are_as_wide_as_the_spread_over_new_draws(measure):
    def entry(seed):
        fake, real = _normal(seed, 200, 0.3), _normal(seed + 1000, 200)
        if measure == "kernel":
            return neighbours.kernel_distance_with_interval(fake, real)
        return neighbours.manifold_measures_with_intervals(fake, real)[measure]

    entries = [entry(seed) for seed in range(30)]
    spread = np.quantile([entry["value"] for entry in entries], [0.025, 0.975])
    widths = [entry["high"] - entry["low"] for entry in entries]
    assert 0.6 < np.median(widths) / (spread[1] - spread[0]) < 1.7
    assert all(entry["low"] <= entry["value"] <= entry["high"] and entry["n"] == 200 for entry in entries)


def test_too_few_images_are_said():
    with pytest.raises(ValueError, match="more than 5 images"):
        neighbours.manifold_measures(_normal(0, 5), _normal(1, 50))
    with pytest.raises(ValueError, match="at least 2 images"):
        neighbours.kernel_distance(_normal(0, 1), _normal(1, 50))
