"""What the page's tabs do, without a browser: draw, look, vote, and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.cli import main
from visbio_diffusers.demo.draw import draw_images, nearest_sheet
from visbio_diffusers.demo.look import describe_upload, edit_upload, reconstruct_upload
from visbio_diffusers.demo.models import MAX_PIXELS, SCHEDULERS, Models, Reference
from visbio_diffusers.demo.votes import draw_pair, vote
from visbio_diffusers.pipelines.schedulers import SCHEDULERS as FIT
from visbio_diffusers.preferences import load_preferences


@pytest.fixture(scope="module")
def models(tiny_pipeline_dir):
    return Models(str(tiny_pipeline_dir), device="cpu")


@pytest.fixture
def cell(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cell.png")
    return str(tmp_path / "cell.png")


def same(image, other) -> bool:
    """Return whether two images differ by rounding at most."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1


def test_drawn_images_and_their_records_are_those_of_the_command(models, tiny_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--num-images", "2", "--seed", "5", "--steps", "3", "--guidance-scale", "2", "--device", "cpu"]
    assert main(["generate", "a cell", "--model", str(tiny_pipeline_dir), *flags]) == 0
    drawing = draw_images(models, " a cell ", 2, 5, 3, 2.0)
    with_maps = draw_images(models, "a cell", 2, 5, 3, 2.0, word_maps=True)
    for number in range(2):
        with Image.open(tmp_path / "out" / f"{number:05d}.png") as written:
            assert written.text == drawing.records[number] == with_maps.records[number]
            assert same(written, drawing.images[number]) and same(written, with_maps.images[number])
    assert drawing.word_maps is None and with_maps.word_maps.width > 300


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_scheduler_draws_and_is_recorded(models, scheduler):
    drawing = draw_images(models, "a cell", 1, 0, 4, 1.5, scheduler)
    assert drawing.records[0]["scheduler"] == (SCHEDULERS[scheduler] or "DDIMScheduler") in FIT
    assert np.asarray(drawing.images[0]).std() > 0
    assert draw_images(models, "a cell", 1, 0, 4).records[0]["scheduler"] == "DDIMScheduler"  # the next one's own


def test_page_begins_at_the_settings_of_the_model(tiny_pipeline_dir, tmp_path):
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.register_to_config(num_inference_steps=3, guidance_scale=1.0, timestep_spacing="cosine")
    pipe.save_pretrained(tmp_path / "model")
    models = Models(str(tmp_path / "model"), device="cpu")
    assert models.defaults == {"num_inference_steps": 3, "guidance_scale": 1.0}
    found = draw_images(models, "a cell", 1).records[0]
    assert (found["num_inference_steps"], found["guidance_scale"], found["timestep_spacing"]) == ("3", "1.0", "cosine")
    other = draw_images(models, "a cell", 1, scheduler="DPM++ 2M").records[0]
    assert (other["num_inference_steps"], other["timestep_spacing"]) == ("3", "cosine")


def test_adapter_is_drawn_with_at_its_scale(tiny_pipeline_dir, tmp_path):
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    weights = get_peft_model_state_dict(pipe.unet)
    VisBioPipeline.save_lora_weights(tmp_path / "run" / "lora", unet_lora_layers=weights)
    models = Models(str(tiny_pipeline_dir), [str(tmp_path / "run" / "lora")], "cpu")
    assert models.adapters == ["none", "run/lora"]
    plain, off, on, more = (
        draw_images(models, "a cell", 1, 0, 3, adapter=name, scale=scale)
        for name, scale in (("none", 1.0), ("run/lora", 0), ("run/lora", 1.0), ("run/lora", 2.0))
    )
    assert same(plain.images[0], off.images[0]) and not same(plain.images[0], on.images[0])
    assert not same(on.images[0], more.images[0])
    assert "lora" not in plain.records[0]
    assert [each.records[0]["lora_scale"] for each in (off, on, more)] == ["0", "1", "2"]
    with pytest.raises(FileNotFoundError, match="no adapter"):
        Models(str(tiny_pipeline_dir), [str(tmp_path / "no")], "cpu")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": "x" * 1001}, "1,001 characters"),
        ({"num_images": 9}, "number of images must be from 1 to 8"),
        ({"num_images": 1.5}, "whole number"),
        ({"seed": -1}, "seed must be from 0"),
        ({"steps": 10**6}, "steps must be from 1 to 50"),
        ({"steps": True}, "steps must be"),
        ({"steps": "3"}, "steps must be"),
        ({"guidance_scale": float("nan")}, "guidance scale must be"),
        ({"scheduler": "PNDM"}, "no scheduler 'PNDM': choose"),
        ({"scheduler": ["DDIM"]}, "no scheduler"),
        ({"adapter": "/etc/passwd"}, "no LoRA"),
        ({"scale": 3}, "LoRA scale must be"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_in_one_line(models, wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        draw_images(models, **{"prompt": "a cell", "steps": 2, **wrong})
    assert len(str(error.value)) < 200


def test_end_of_a_long_prompt_is_told(models):
    assert draw_images(models, "a cell", 1, 0, 1).warnings == []
    (warning,) = draw_images(models, "a cell, " + "very " * 60, 1, 0, 1).warnings
    assert "cut off" in warning


def test_nearest_real_image_is_found(visbio_data, tiny_pipeline_dir):
    data = str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz")
    reference = Models(str(tiny_pipeline_dir), device="cpu", reference=data).reference
    assert reference.images.shape[1:] == (8, 8, 3) and len(reference.captions) == len(reference.images) > 10_000
    drawn = [Image.fromarray(reference.images[row]) for row in (7, 4000)]
    sheet = np.asarray(nearest_sheet(drawn, reference))
    tiles = sheet[:, :148], sheet[:, 148:296]
    for tile in tiles:  # a copy lies above itself
        assert np.array_equal(tile[4:144, 4:144], tile[4 + len(tile) // 2 : 144 + len(tile) // 2, 4:144])
    apart = Reference("black", np.zeros((2, 8, 8, 3), np.uint8), ["one", "two"])
    assert nearest_sheet(drawn, apart).size == nearest_sheet(drawn, reference).size


def test_real_cell_is_described_and_noise_is_none_of_these(models, visbio_data, cell, tmp_path):
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        image, label = real["test_images"][3], int(real["test_labels"][3].item())
    Image.fromarray(image).save(tmp_path / "real.png")
    said = describe_upload(models, str(tmp_path / "real.png"))
    assert np.array_equal(said.seen, image) and said.doubt == "" and label == 5
    assert next(iter(said.probabilities)) == "a microscopy image of a monocyte"
    assert sum(said.probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert describe_upload(models, cell).doubt


def test_uploads_are_redrawn_as_by_the_commands(models, tiny_pipeline_dir, cell, tmp_path):
    flags = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "4", "--output", str(tmp_path / "a.png")]
    assert main(["reconstruct", cell, "--strength", "0.5", "--seed", "3", "--guidance-scale", "2", *flags]) == 0
    again = reconstruct_upload(models, cell, 0.5, "", 3, 4, 2.0)
    with Image.open(tmp_path / "a.png") as written:
        assert same(written, again.drawn) and written.text == again.record
    assert again.given.size == (8, 8)
    assert main(["edit", cell, "a cell", "dust", "--guidance-scale", "2", *flags]) == 0
    edited = edit_upload(models, cell, "a cell", "dust", 4, 2.0)
    with Image.open(tmp_path / "a.png") as written:
        assert same(written, edited.drawn) and written.text == edited.record
    for wrong in ({"strength": 2}, {"strength": "1"}, {"seed": 0.5}, {"steps": 10**6}, {"prompt": 7}):
        with pytest.raises(ValueError):
            reconstruct_upload(models, cell, **wrong)
    with pytest.raises(ValueError, match="what it is to show is empty"):
        edit_upload(models, cell, "a cell", "")


def test_uploads_that_are_no_images_are_named_without_their_folder(models, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("L", (side, side)).save(tmp_path / "large.png")
    Image.new("L", (side, side)).save(tmp_path / "large.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:1000])
    for name in ("text.png", "large.png", "large.tif", "cut.png", "none.png"):
        with pytest.raises(ValueError, match=name) as error:
            describe_upload(models, str(tmp_path / name))
        assert str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="upload one"):
        describe_upload(models, None)


def test_vote_is_kept_with_images_and_their_records(models, tmp_path):
    pair = draw_pair(models, " a cell ", steps=2)
    assert vote(tmp_path, pair, "left", "A\nda" + "x" * 50) and vote(tmp_path, pair, "right")
    assert not vote(tmp_path, pair, "skip")
    left, right = (np.asarray(image) for image in pair.images)
    found = load_preferences(tmp_path / "pairs.jsonl", 8)
    assert found.prompts == ["a cell"] * 2 and not np.array_equal(left, right)
    assert np.array_equal(found.better, [left, right]) and np.array_equal(found.worse, [right, left])
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert first["who"] == "Ada" + "x" * 37
    with Image.open(tmp_path / first["image_w"]) as image:
        assert image.text == pair.records[0] and image.text["synthetic"] == "true"
    with pytest.raises(ValueError, match="draw a pair first"):
        vote(tmp_path, None, "left")
    with pytest.raises(ValueError, match="no vote 'both'"):
        vote(tmp_path, pair, "both")


def test_models_of_another_kind_are_refused(tiny_stable_diffusion_dir):
    with pytest.raises(ValueError, match="denoises pixels"):
        Models(str(tiny_stable_diffusion_dir), device="cpu")


def test_examples_are_the_classes_that_the_model_has_learned():
    models = Models(device="cpu")
    assert len(models.examples) == 8 and "a microscopy image of a monocyte" in models.examples
    assert {"none", "visbio-nuclei-lora", "visbio-blood-28-rlsf"} <= set(models.adapters)
    assert draw_images(models, models.examples[0], 1, 0, 1, adapter="visbio-nuclei-lora").records[0]["lora_sha256"]
