"""What is measured of restored images, by hand and by torchmetrics; tables, plot, and the script on real images."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation.degraded import Bench
from visbio_diffusers.evaluation.restoration import (
    Beholder,
    distortion,
    mean_interval,
    plot_strengths,
    render_restoration,
)


ROOT = Path(__file__).parents[1]
JUDGES = ROOT / "model_cards" / "evaluators-blood-28"


@pytest.fixture(scope="module")
def real(visbio_data):
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as content:
        return content["test_images"][:200], content["test_labels"][:200, 0].astype(np.int64)


def test_mean_and_its_interval():
    values = np.random.default_rng(0).normal(3, 2, (2000, 100))
    inside = [found["low"] <= 3 <= found["high"] for found in map(mean_interval, values)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert mean_interval(np.array([1.0, 3.0]))["value"] == 2


def test_distortion_equals_that_of_torchmetrics(real):
    images, noise = real[0][:8], np.random.default_rng(0).integers(-20, 21, real[0][:8].shape)
    noisy = (images + noise).clip(0, 255).astype(np.uint8)
    found = distortion(noisy, images)
    pixels = [torch.from_numpy(each).double() for each in (noisy, images)]
    expected = peak_signal_noise_ratio(*pixels, data_range=255.0, dim=(1, 2, 3), reduction="none").mean()
    assert found["psnr"]["value"] == pytest.approx(expected.item(), abs=1e-4)
    same = distortion(images, images)
    assert same["ssim"]["value"] == pytest.approx(1) and same["psnr"]["value"] == pytest.approx(81.8, abs=0.1)
    off_by_one = images.copy()
    off_by_one[:, 0, 0, 0] ^= 1
    assert distortion(off_by_one, images)["psnr"]["value"] == pytest.approx(same["psnr"]["value"])


def test_judges_see_noise_and_the_originals(real):
    images, labels = real
    judges = {"cnn3": networks.load(JUDGES / "cnn3")[0], "simclr": networks.load(JUDGES / "simclr")[0]}
    beholder = Beholder(judges, images[:60], labels[:60], images[60:])
    own = beholder(images[:60])
    noisy = images[:60] + np.random.default_rng(0).integers(-60, 61, images[:60].shape)
    found = beholder(noisy.clip(0, 255).astype(np.uint8))
    assert "recognised" not in own["simclr"] and own["cnn3"]["recognised"]["value"] > 0.9
    for name in judges:
        assert own[name]["paired"]["value"] == 0 and own[name]["frechet"]["ratio"]["value"] == pytest.approx(1)
        assert found[name]["paired"]["low"] > 0.5 and found[name]["frechet"]["ratio"]["low"] > 1.1


def test_holes_lie_within_the_images(tiny_pipeline, real):
    bench = Bench(tiny_pipeline, real[0][:40], ["a cell"] * 40, 1, 0)
    inside = [image[hole].shape for image, hole in zip(real[0], bench.holes(12))]
    assert set(inside) == {(12, 12, 3)} and len(set(map(str, bench.holes(12)))) > 20
    assert bench.holes(12) == bench.holes(12) and bench.holes(28)[0] == (slice(0, 28), slice(0, 28))
    with pytest.raises(ValueError, match="a hole has from 1 to 28 pixels each way, not 29"):
        bench.holes(29)


def test_plot_has_the_points_in_their_places():
    entry = {"value": 10.0, "low": 10.0, "high": 10.0}
    half = {"value": 0.5, "low": 0.5, "high": 0.5}
    picture = np.array(plot_strengths({0.0: {"psnr": entry, "ssim": half}, 1.0: {"psnr": entry, "ssim": half}}))
    blue = np.argwhere((picture == (31, 78, 156)).all(axis=2))
    inner = blue[(blue[:, 1] > 60) & (blue[:, 1] < 490)]
    assert set(inner[:, 0]) <= {29, 30, 31} and len(inner) > 400  # 10 of 10 dB: the upper edge


def test_script_measures_real_images(real, tmp_path):
    output, data = tmp_path / "found" / "restoration.json", tmp_path / "bloodmnist_few.npz"
    np.savez(data, test_images=real[0][:40], test_labels=real[1][:40, None].astype(np.uint8))
    flags = ["--dataset_name", str(data), "--output", str(output), "--num_images", "3", "--batch_size", "2"]
    flags += ["--num_inference_steps", "1", "--denoising_steps", "1", "--num_samples", "2", "--strengths", "0", "1"]
    flags += ["--noise_stds", "0.1", "--evaluators", str(JUDGES)]
    command = [sys.executable, str(ROOT / "train_scripts" / "evaluate_reconstruction.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(output.read_text())
    tasks = results["tasks"]
    assert tasks["reconstruction"]["0"]["ssim"]["value"] == pytest.approx(1)
    assert tasks["reconstruction"]["1"]["ssim"]["value"] < 0.9
    denoising = {name: entry["psnr"]["value"] for name, entry in tasks["denoising"].items()}
    given, cleaned = denoising["noise 0.1: as it is"], denoising["noise 0.1: ours, one step"]
    assert cleaned > given + 5 and given == pytest.approx(20, abs=1)  # 20 log10(1 / 0.1), but for white, which is cut
    assert done.stdout == render_restoration(results) == output.with_suffix(".md").read_text()
    assert "| nearest pixel |" in done.stdout and "| lanczos |" in done.stdout
    assert Image.open(output.with_name("restoration_inpainting.png")).size == (6 * 92, 3 * 131)
    assert Image.open(output.with_name("restoration_strength.png")).size == (560, 320)
    drawn = sorted(output.with_suffix("").glob("*/*.npy"))
    times = [file.stat().st_mtime_ns for file in drawn]
    drawn[0].unlink()
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0  # goes on where it stopped
    assert [file.stat().st_mtime_ns for file in drawn][1:] == times[1:] and drawn[0].exists()
    again = json.loads(output.read_text())
    assert again["tasks"] == tasks


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tasks", "deblurring"],
            "tasks must be of reconstruction, inpainting, super_resolution, denoising, got",
        ),
        (["--num_images", "1"], "num_images must be at least 2, got 1"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(flags, message, capsys):
    script = runpy.run_path(str(ROOT / "train_scripts" / "evaluate_reconstruction.py"))
    argv = ["--dataset_name", "bloodmnist", "--output", "a.json", *flags]
    with pytest.raises(SystemExit) as end:
        script["parse"](script["EvaluateReconstructionConfig"], {}, argv)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and shown.count("\n") == 1
