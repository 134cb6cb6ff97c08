"""`visbio reconstruct`, `visbio edit` and `visbio restore`: what they write, its record, and one-line answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioRestorationPipeline
from visbio_diffusers.cli import main
from visbio_diffusers.files import digest


@pytest.fixture
def photograph(tmp_path):
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "cell.png")
    return tmp_path / "cell.png"


def test_reconstruct_writes_the_image_and_how_it_was_made(photograph, tiny_pipeline_dir, tmp_path, capsys):
    flags = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "4", "--output", str(tmp_path / "a.png")]
    command = ["reconstruct", str(photograph), "--prompt", "a cell", "--strength", "0.5", "--seed", "7", *flags]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    written = Image.open(tmp_path / "a.png")
    pipe = VisBioImg2ImgPipeline.from_pretrained(tiny_pipeline_dir)
    record = json.loads(written.info["parameters"])
    call = {name: value for name, value in record["call"].items() if name != "seed"}
    generator = torch.Generator().manual_seed(record["call"]["seed"])
    again = pipe(image=Image.open(photograph), generator=generator, **call).images[0]
    assert np.array_equal(written, again) and not np.array_equal(written, Image.open(photograph))
    assert written.info["synthetic"] == "true" and record["image_sha256"] == digest(photograph)
    assert written.info["model_sha256"] and written.info["strength"] == "0.5"
    assert main(["reconstruct", str(photograph), "--strength", "0", *flags]) == 0  # without text
    assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(photograph))


def test_edit_shows_image_reconstruction_and_edit(photograph, tiny_pipeline_dir, tmp_path):
    flags = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "4", "--output", str(tmp_path / "b.png")]
    assert main(["edit", str(photograph), "a cell", "dust", *flags]) == 0
    written = Image.open(tmp_path / "b.png")
    given, again, edited = np.split(np.array(written).astype(int), 3, axis=1)
    assert np.array_equal(given, Image.open(photograph))
    assert np.abs(again - given).mean() < 3  # an untrained model, whose predictions are weak
    assert edited.shape == given.shape
    assert json.loads(written.info["parameters"])["call"]["source"] == "a cell"
    assert written.info["prompt"] == "dust"


def test_restore_writes_samples_mean_and_spread_with_the_degradation(photograph, tiny_pipeline_dir, tmp_path, capsys):
    output = tmp_path / "d.png"
    flags = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "3", "--output", str(output)]
    command = ["restore", str(photograph), "--task", "denoise", "--noise-std", "0.2", "--num-images", "3", *flags]
    assert main([*command, "--seed", "5"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    written = Image.open(output)
    samples, (mean, spread) = (part := np.split(np.array(written).astype(float), 5, axis=1))[:3], part[3:]
    np.testing.assert_allclose(mean, np.mean(samples, axis=0), atol=0.5)
    np.testing.assert_allclose(spread, 4 * np.std(samples, axis=0, ddof=1).clip(max=63.75), atol=2.5)
    pipe = VisBioRestorationPipeline.from_pretrained(tiny_pipeline_dir)
    generator = torch.Generator().manual_seed(6)
    again = pipe(image=Image.open(photograph), noise_std=0.2, num_inference_steps=3, generator=generator).images[0]
    assert np.array_equal(samples[1], again)
    record = json.loads(written.info["parameters"])
    assert record["degradation"] == "mean of 1 x 1 pixels + Gaussian noise of std 0.2 of white"
    assert written.info["noise_std"] == "0.2" and written.info["synthetic"] == "true"
    assert record["call"]["seed"] == 5 and record["image_sha256"] == digest(photograph)


def test_restore_enlarges_and_estimates(photograph, tiny_pipeline_dir, tmp_path, capsys):
    output = tmp_path / "e.png"
    flags = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "2", "--output", str(output)]
    assert main(["restore", str(photograph), "--task", "super-resolution", *flags]) == 0
    written = Image.open(output)
    small = Image.open(photograph).resize((4, 4), Image.Resampling.BICUBIC)  # to the model's size over 2
    means = np.array(written).reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert written.size == (8, 8) and np.abs(means - np.array(small)).max() <= 0.5
    assert written.info["factor"] == "2" and written.info["noise_std"] == "0.0"
    assert main(["restore", str(photograph), "--task", "denoise", "--prompt", "a cell", *flags]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    taken = float(Image.open(output).info["noise_std"])
    assert said == f"noise estimated at {taken:.3f} of white" and 0.1 < taken < 0.6  # pixels at random


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["restore", "IMAGE", "--task", "denoise", "--noise-std", "20"], "`noise_std` must be from 0 to 1"),
        (["restore", "IMAGE", "--task", "denoise", "--noise-std", "0"], "there is nothing to restore"),
        (["restore", "IMAGE", "--task", "super-resolution", "--factor", "3"], "`factor` must be a whole number that"),
        (["restore", "IMAGE", "--task", "super-resolution", "--factor", "9"], "`factor` must be a whole number that"),
        (["reconstruct", "IMAGE", "--strength", "2"], "`strength` must be from 0"),
        (["reconstruct", "none.png"], "none.png"),
        (["edit", "IMAGE", "a cell", " "], "`prompt` is empty"),
        (["edit", "IMAGE", "", "a cell"], "`prompt` is empty"),
    ],
)
def test_mistakes_are_answered_in_one_line(photograph, tiny_pipeline_dir, tmp_path, capsys, arguments, message):
    arguments = [str(photograph) if each == "IMAGE" else each for each in arguments]
    flags = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "2", "--output", str(tmp_path / "c.png")]
    assert main([*arguments, *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("visbio: error: ") and message in error
    assert not (tmp_path / "c.png").exists()
