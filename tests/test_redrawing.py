"""`visbio reconstruct` and `visbio edit`: what they write, the record in it, and their one-line answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
