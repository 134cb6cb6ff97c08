"""Every training script, as users start it: two steps through `accelerate launch`, a kill, a resume."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import BertConfig, BertForMaskedLM


ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(script, *flags):
    return [*LAUNCH, str(ROOT / "train_scripts" / script), "--preset", "tiny", *map(str, flags)]


def launch(script, *flags):
    """Run a script to its end and return what it printed."""
    done = subprocess.run(command(script, *flags), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def blood_npz(tmp_path_factory):
    """A small set in MedMNIST's format: 8 classes, 5 images each, so that 8 steps of 8 cross an epoch."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "bloodmnist_small.npz"
    labels = np.arange(40, dtype=np.uint8)[:, None] % 8
    images = rng.integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=labels)
    return path


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """The result of train_text_encoder.py: two steps, then resumed to four."""
    folder = tmp_path_factory.mktemp("text")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        json.dumps({"abstract": "Blood cells are counted and classified by automated analysers."}) + "\n"
    )
    flags = ("--corpus", corpus, "--output_dir", folder / "run", "--checkpointing_steps", 2, "--max_train_steps")
    launch("train_text_encoder.py", *flags, 2)
    launch("train_text_encoder.py", *flags, 4, "--resume_from_checkpoint", "latest")
    return folder / "run" / "text_encoder"


def test_text_encoder_script_resumes_and_writes_a_bert(text_encoder):
    steps = [json.loads(line)["step"] for line in (text_encoder.parent / "loss.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    from transformers import AutoTokenizer, BertModel

    encoder, tokenizer = BertModel.from_pretrained(text_encoder), AutoTokenizer.from_pretrained(text_encoder)
    assert encoder.config.vocab_size == len(tokenizer)
    assert "[UNK]" not in tokenizer.tokenize("a segmented neutrophil, wright-giemsa stain")


def test_every_batch_gives_every_parameter_a_gradient():
    """DDP waits for all of them, also in batches that hold no captions."""
    script = runpy.run_path(str(ROOT / "train_scripts" / "train_text_encoder.py"))
    shape = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = script["CaptionEncoder"](BertForMaskedLM(BertConfig(**shape)), 3)
    ids = torch.tensor([[1, 2, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[-100, 5, -100]])}
    script["caption_loss"](model, batch, 1.0)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_text_to_image_killed_in_an_epoch_equals_the_uninterrupted_run(blood_npz, text_encoder, tmp_path):
    def flags(name):
        return (
            *("--dataset_name", blood_npz, "--text_encoder", text_encoder, "--output_dir", tmp_path / name),
            *("--gradient_accumulation_steps", 2, "--max_train_steps", 8, "--checkpointing_steps", 5),
        )

    launch("train_text_to_image.py", *flags("straight"))

    killed = subprocess.Popen(
        command("train_text_to_image.py", *flags("killed")),
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoint-0000005").exists():
        assert killed.poll() is None and time.monotonic() < deadline, "no checkpoint before the end"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for late in ("checkpoint-0000008", "pipeline"):  # the run may have got so far before the signal
        assert not (tmp_path / "killed" / late).exists(), "the kill came too late to test anything"
    launch("train_text_to_image.py", *flags("killed"), "--resume_from_checkpoint", "latest")

    for file in ("checkpoint-0000008/model.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        straight, resumed = load_file(tmp_path / "straight" / file), load_file(tmp_path / "killed" / file)
        assert straight.keys() == resumed.keys()
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)
    sampler = json.loads((tmp_path / "straight" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert sampler["algorithm_type"] == "sde-dpmsolver++" and sampler["rescale_betas_zero_snr"]
    logs = [(tmp_path / name / "loss.jsonl").read_bytes() for name in ("straight", "killed")]
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 8


def test_data_on_the_device_give_the_same_training(blood_npz, text_encoder, tmp_path):
    flags = ("--dataset_name", blood_npz, "--text_encoder", text_encoder, "--max_train_steps", 3)
    losses = []
    for resident in ("no", "yes"):
        folder = tmp_path / resident
        launch("train_text_to_image.py", *flags, "--output_dir", folder, "--resident_data", resident)
        losses.append([json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)  # texts are padded further


def test_pipeline_of_a_training_draws_in_a_new_process(blood_npz, text_encoder, tmp_path):
    launch(
        "train_text_to_image.py",
        *("--dataset_name", blood_npz, "--text_encoder", text_encoder, "--output_dir", tmp_path / "run"),
        *("--max_train_steps", 2, "--validation_steps", 1, "--num_validation_images", 1),
        *("--validation_prompts", "a monocyte", "--report_to", "tensorboard"),
    )
    assert (tmp_path / "run" / "validation" / "step-0000002.png").stat().st_size > 0
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))
    code = (
        "import sys, visbio_diffusers; from diffusers import DiffusionPipeline;"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]);"
        "print(pipe('a monocyte', num_inference_steps=2).images[0].size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run" / "pipeline")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.stdout.strip() == "(28, 28)", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unet_config", "{"], "unet_config must be JSON"),
        (["--unet_config", '{"width": 3}'], "unet_config must be a JSON object of sample_size, in_channels"),
        (["--unet_config", '{"_class_name": "UNet3D"}'], "unet_config is for VisBioUNet or UNet2DConditionModel"),
        (["--unet_config", "[]"], "unet_config is for VisBioUNet or UNet2DConditionModel, got []"),
        (["--caption_dropout", "1.5"], "caption_dropout"),
        (["--learning_rat", "1"], "--learning_rat"),
        ([], "nothing to train on: give --dataset_name"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_line(flags, message, tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "train_scripts" / "train_text_to_image.py"))
    argv = ["--preset", "tiny", "--output_dir", str(tmp_path / "run"), *flags]
    with pytest.raises(SystemExit) as end:
        script["parse"](script["TextToImageConfig"], script["PRESETS"], argv)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and shown.count("\n") == 1


def test_an_unknown_set_is_answered_in_one_line(tmp_path):
    script = ROOT / "train_scripts" / "train_text_to_image.py"
    done = subprocess.run(
        [sys.executable, script, "--preset", "tiny", "--dataset_name", "bloodmist", "--output_dir", tmp_path / "run"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "did you mean 'bloodmnist'" in last and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_pipeline_cut_short_is_no_start_of_a_training(tiny_pipeline_dir, tmp_path):
    script = runpy.run_path(str(ROOT / "train_scripts" / "train_text_to_image.py"))
    shutil.copytree(tiny_pipeline_dir, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    flags = ["--dataset_name", "bloodmnist", "--pretrained_model_name_or_path", str(tmp_path / "cut")]
    config = script["parse"](script["TextToImageConfig"], {}, [*flags, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="cannot load the model .*cut .*: get a whole copy of it"):
        script["load_models"](config)
