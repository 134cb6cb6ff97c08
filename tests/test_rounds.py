"""Reward fine-tuning on a tiny pipeline: rewards rise, runs resume, processes agree, cheating is seen."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.rounds import LOG_NAME


ROOT = Path(__file__).parents[1]
FILE = ROOT / "train_scripts" / "train_ddpo_lora.py"
SCRIPT = runpy.run_path(str(FILE))
WEIGHTS = "lora/pytorch_lora_weights.safetensors"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

OWN_REWARDS = """
import os, signal, pathlib, torch

def noise(images, prompts):
    return torch.rand(len(images), generator=torch.Generator().manual_seed(int(images.abs().sum() * 1e4) % 2**31))

def killed(images, prompts):
    calls = pathlib.Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if len(calls.read_text()) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean(dim=(1, 2, 3))

def constant(images, prompts):
    return [2] * len(images)
"""


@pytest.fixture(scope="module")
def base(tiny_pipeline_dir, tmp_path_factory):
    """A tiny pipeline that draws noise of no one colour."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import _fill

    folder = tmp_path_factory.mktemp("base")
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    _fill(pipe.unet)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def flags(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy_rewards.py").write_text(OWN_REWARDS)
    Path("prompts.txt").write_text("a cell\na nucleus\n")
    common = ["--preset", "tiny", "--pretrained_model_name_or_path", base, "--prompts", "prompts.txt"]
    common += ["--target_modules", "conv_in", "conv2", "conv_out", "--learning_rate", 2e-2, "--clip_range", 1e-2]
    common += [
        "--num_rounds",
        4,
        "--num_images_per_prompt",
        8,
        "--train_batch_size",
        16,
        "--num_validation_prompts",
        2,
    ]
    return list(map(str, common))


def train(flags, name, *more):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    argv = [*flags, "--output_dir", name, *map(str, more)]
    assert SCRIPT["main"](SCRIPT["parse"](SCRIPT["DDPOConfig"], SCRIPT["PRESETS"], argv)) == 0
    return rows(name)


def rows(name):
    return [json.loads(line) for line in Path(name, LOG_NAME).read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "reward", "rise"),
    [
        ("clipped_ratio", "brightness", (0.1, 1)),
        ("clipped_ratio", "-brightness", (0.1, 1)),
        ("score_function", "brightness", (0.05, 1)),
        ("matching", "brightness", (0.05, 1)),
        ("draft", "brightness", (0.1, 1)),
    ],
)
def test_the_reward_rises(flags, objective, reward, rise):
    more = ("--num_rounds", 6, "--train_timestep_fraction", 1, "--objective", objective, f"--reward={reward}")
    more += ("--gradient_accumulation_steps", 3) if objective == "score_function" else ()
    found = train(flags, "run", *more)
    assert rise[0] < found[-1]["heldout_prompts_reward"] - found[0]["heldout_prompts_reward"] < rise[1]
    assert found[-1]["kl_to_base"] > 1 and found[0]["kl_to_base"] == 0
    assert len(list(Path("run/validation").glob("*.png"))) == 3  # at the start, after five rounds, and at the end


def test_noise_teaches_nothing_of_the_reward(flags):
    found = train(flags, "run", "--reward", "toy_rewards:noise", "--heldout_reward", "brightness", "--patience", 0)
    assert abs(found[-1]["heldout_reward"] - found[0]["heldout_reward"]) < 0.1
    assert 0.3 < found[-2]["reward"] < 0.7


def test_divergence_holds_the_policy_back(flags):
    free, held = (train(flags, f"run-{weight}", "--kl_weight", weight)[-1]["kl_to_base"] for weight in (0, 10))
    assert held < free / 2


@pytest.mark.parametrize("more", [("--baseline", "tracker"), ("--num_inner_epochs", 2, "--use_ema", "true")])
def test_resumed_equals_uninterrupted(flags, more):
    train(flags, "straight", *more, "--num_rounds", 3, "--save_rounds", 1)
    train(flags, "stopped", *more, "--num_rounds", 2, "--save_rounds", 1)
    train(flags, "stopped", *more, "--num_rounds", 3, "--save_rounds", 1, "--resume_from_checkpoint", "latest")
    logs = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(name)] for name in ("straight", "stopped")
    ]
    assert logs[0] == logs[1]
    one, other = load_file(f"straight/{WEIGHTS}"), load_file(f"stopped/{WEIGHTS}")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_killed_in_a_rollout_only_the_round_is_lost(flags):
    command = [sys.executable, str(FILE), *flags, "--output_dir", "run", "--reward", "toy_rewards:killed"]
    command += ["--save_rounds", "2", "--validation_rounds", "0"]
    killed = subprocess.run(command, capture_output=True, env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL
    assert [row["round"] for row in rows("run")] == [0, 1, 2]  # the fifth call was that of the fourth round
    resumed = subprocess.run(
        [*command, "--resume_from_checkpoint", "latest"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert [row["round"] for row in rows("run")] == [0, 1, 2, 3, 4] and Path("run", WEIGHTS).is_file()


LAUNCHED = """
import os, runpy, sys, torch
script = runpy.run_path(sys.argv[1])
finish = script["Rounds"].finish

def finish_and_save(rounds):
    finish(rounds)
    trained = {name: value.detach() for name, value in rounds.unet.named_parameters() if value.requires_grad}
    torch.save(trained, f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking two processes down has been seen to hang in gloo

script["Rounds"].finish = finish_and_save
script["main"](script["parse"](script["DDPOConfig"], script["PRESETS"], sys.argv[2:]))
"""


def test_two_processes_share_a_round_and_end_with_one_adapter(flags):
    Path("launched.py").write_text(LAUNCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "launched.py"]
    command = [*launch, str(FILE), *flags, "--output_dir", "run", "--num_rounds", "2", "--kl_weight", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    assert any(value.abs().sum() > 0 for name, value in one.items() if "lora_B" in name)
    assert [row["queries"] for row in rows("run")[:-1]] == [16, 16]


def test_training_ends_where_the_heldout_reward_falls_and_goes_back_to_its_best(flags, caplog):
    more = ("--num_rounds", 9, "--validation_rounds", 1, "--patience", 2, "--heldout_reward=-brightness")
    found = train(flags, "run", *more)
    scores = [row["heldout_reward"] for row in found]
    best = scores.index(max(scores))
    assert len(found) < 9 and f"falls since round {best}" in caplog.text
    train(flags, "short", "--num_rounds", max(best, 1), "--save_rounds", 1, "--validation_rounds", 0)
    kept, expected = load_file(f"run/{WEIGHTS}"), load_file(f"short/{WEIGHTS}")
    if best:
        assert all(torch.equal(kept[name], expected[name]) for name in kept)
    else:
        assert all(value.abs().sum() == 0 for name, value in kept.items() if ".lora_B." in name)


def test_a_constant_reward_changes_nothing(flags, caplog):
    found = train(flags, "run", "--num_rounds", 1, "--reward", "toy_rewards:constant")
    assert found[0]["zero_spread"] == 1 and found[-1]["kl_to_base"] == 0
    assert "toy_rewards:constant is the same for all images of a prompt" in caplog.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--eta", 0), "eta must be above 0 for objective clipped_ratio"),
        (("--objective", "score_function", "--num_inner_epochs", 2), "num_inner_epochs must be 1"),
        (
            ("--objective", "draft", "--reward", "jpeg_compressibility"),
            "objective draft needs a reward with gradients",
        ),
        (("--train_batch_size", 512), "a round has 32 samples for each process, and an optimizer step takes 512"),
        (
            ("--objective", "score_function"),
            "a round has one optimizer step, not 2: raise --gradient_accumulation_steps to 2",
        ),
        (("--heldout_reward", "brightness"), "heldout_reward brightness is by the model of the reward"),
        (("--sample_steps", 1), "sample_steps must be at least 2"),
        (("--lora_dropout", 0.1), "compile and lora_dropout are not supported here"),
        (("--max_train_steps", 7), "max_train_steps follows from num_rounds and save_rounds"),
        (("--objective", "draft", "--kl_weight", 1), "kl_weight is for the objectives on steps, not for draft"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, more, said, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        train(flags, "run", *more)
    assert said in str(error.value) + capsys.readouterr().err
    assert not Path("run", "lora").exists()


@pytest.mark.parametrize("objective", ["clipped_ratio", "draft"])
def test_stable_diffusion_is_tuned_alike(flags, tiny_stable_diffusion_dir, objective):
    more = ("--pretrained_model_name_or_path", tiny_stable_diffusion_dir, "--objective", objective, "--num_rounds", 2)
    more += ("--guidance_scale", 2, "--target_modules", "to_q", "to_k", "to_v", "to_out.0", "--train_batch_size", 8)
    found = train(flags, "run", *more)
    assert found[-1]["kl_to_base"] > 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion_dir)
    pipe.load_lora_weights("run/lora")
    assert any("lora_A" in name for name, _ in pipe.unet.named_parameters())
    card = Path("run/lora/README.md").read_text()
    assert "pipe = DiffusionPipeline" in card and "VisBioPipeline" not in card and "by the reward brightness" in card


def test_defaults_of_the_rounds_win_over_those_of_other_trainings():
    config = SCRIPT["parse"](SCRIPT["DDPOConfig"], SCRIPT["PRESETS"], ["--output_dir", "run"])
    assert (config.learning_rate, config.use_ema, config.rank) == (3e-4, False, 8)
