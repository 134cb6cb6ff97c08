"""The training of an adapter: what it trains, what it keeps, and that it goes on where it stopped."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from visbio_diffusers.load import load_pipeline


ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "train_scripts" / "train_text_to_image_lora.py"))
WEIGHTS = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bloodmnist_small.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 28, 28, 3), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=np.arange(24, dtype=np.uint8)[:, None] % 8)
    return path


@pytest.fixture
def train(tiny_pipeline_dir, dataset, tmp_path):
    def run(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        argv = ["--preset", "tiny", "--resolution", "8", "--pretrained_model_name_or_path", str(tiny_pipeline_dir)]
        argv += ["--dataset_name", str(dataset), "--output_dir", str(tmp_path / name), "--rank", "2"]
        argv += ["--learning_rate", "0.01", "--max_train_steps", "4", *map(str, flags)]
        assert SCRIPT["main"](SCRIPT["parse"](SCRIPT["LoraTrainConfig"], SCRIPT["PRESETS"], argv)) == 0
        return tmp_path / name

    return run


def test_resumed_equals_uninterrupted_and_checkpoints_hold_the_adapter_alone(train):
    flags = ("--gradient_accumulation_steps", 2, "--checkpointing_steps", 2, "--lora_dropout", 0.1)
    straight = train("straight", *flags)
    train("stopped", *flags, "--max_train_steps", 2)
    resumed = train("stopped", *flags, "--resume_from_checkpoint", "latest")
    for file in (WEIGHTS, "checkpoint-0000004/model.safetensors"):
        one, other = load_file(straight / file), load_file(resumed / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert all(".lora_" in name for name in one)
    assert (straight / "loss.jsonl").read_bytes() == (resumed / "loss.jsonl").read_bytes()
    with pytest.raises(ValueError, match="checkpoint-0000004 was saved with other weights than are trained now"):
        train("stopped", *flags, "--rank", 3, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="other weights than are trained now: .*lora_A"):
        more = ("--target_modules", "to_q", "conv1", "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
        train("stopped", *flags, *more)


def test_adapter_is_averaged_saved_with_its_record_and_changes_what_is_drawn(train, tiny_pipeline_dir):
    folder = train("run", "--target_modules", "to_q", "conv1", "film", "--save_dtype", "fp32")
    last = load_file(folder / "checkpoint-0000004" / "model.safetensors")
    saved = load_file(folder / WEIGHTS)
    name = "mid_block.transformer_blocks.0.attn1.to_q.lora_B"
    assert saved[f"unet.{name}.weight"].abs().max() > 0
    assert not torch.equal(saved[f"unet.{name}.weight"], last[f"{name}.default.weight"])  # the average
    assert any(".conv1.lora_A" in key for key in saved) and any(".film.lora_A" in key for key in saved)
    record = json.loads((folder / "lora" / "training.json").read_text())
    assert record["config"]["rank"] == 2 and record["caption_banks"] == ["bloodmnist"] and record["versions"]

    def draw(*lora):
        pipe, facts = load_pipeline(str(tiny_pipeline_dir), "cpu", "float32", *lora)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a cell", num_inference_steps=2, generator=generator, output_type="np").images, facts

    plain, facts = draw()
    adapted, lora_facts = draw(str(folder / "lora"))
    assert np.abs(adapted - plain).max() > 1e-4 and np.array_equal(draw(str(folder / "lora"), 0.0)[0], plain)
    assert lora_facts["lora"] == "lora" and lora_facts["model_sha256"] == facts["model_sha256"]
    assert lora_facts["caption_banks"] == "bloodmnist" and lora_facts["lora_scale"] == "1"
    with pytest.raises(FileNotFoundError, match="no adapter .*nowhere: give its folder, or a Hub id"):
        draw(str(folder / "nowhere"))


def test_gradients_are_clipped(train):
    """AdamW's first moment after one step is 0.1 times the gradient that reached it."""
    norms = {}
    for limit in (1e9, 1e-3):
        folder = train(f"limit-{limit}", "--max_grad_norm", limit, "--max_train_steps", 1)
        state = torch.load(folder / "checkpoint-0000001" / "optimizer.bin", weights_only=True)["state"]
        norms[limit] = torch.stack([each["exp_avg"].norm() for each in state.values()]).norm().item()
    unclipped = json.loads((folder / "loss.jsonl").read_text())["grad_norm"]
    assert norms[1e9] == pytest.approx(0.1 * unclipped, rel=1e-4) and norms[1e-3] == pytest.approx(1e-4, rel=1e-3)


def test_validation_shows_images_with_and_without_the_adapter(train):
    flags = ("--validation_prompts", "a cell", "--num_validation_images", 2, "--validation_steps", 2)
    sheet = np.asarray(Image.open(train("run", *flags, "--learning_rate", 1) / "validation" / "step-0000004.png"))
    side = sheet.shape[1] // 4
    pictures = [sheet[:side, k * side : (k + 1) * side].astype(int) for k in range(4)]
    assert all(np.abs(pictures[k] - pictures[k + 2]).max() > 8 for k in (0, 1))  # the same seeds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", 0], "rank must be at least 1"),
        (["--lora_dropout", 1], "lora_dropout must be in"),
        (["--dataset_name"], "nothing to train on"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(flags, message, train, capsys):
    with pytest.raises(SystemExit):
        train("run", *flags)
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_layers_that_are_not_there_are_named(train, tmp_path):
    with pytest.raises(ValueError, match="has no layers to_x: choose --target_modules"):
        train("run", "--target_modules", "to_q", "to_x")
