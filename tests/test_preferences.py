"""Preferred images: keeping and reading them, a reward learned from them, and an adapter tuned to them."""

import hashlib
import io
import json
import os
import runpy
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from visbio_diffusers.alignment.preference import PreferenceHead, bradley_terry_loss
from visbio_diffusers.load import load_pipeline
from visbio_diffusers.preferences import add_preference, load_preferences, preference_batches
from visbio_diffusers.rewards import find_reward


ROOT = Path(__file__).parents[1]


def run(name, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = runpy.run_path(str(ROOT / "train_scripts" / name))
    config_class = next(script[each] for each in ("DPOConfig", "RewardConfig") if each in script)
    assert (
        script["main"](script["parse"](config_class, script["PRESETS"], ["--preset", "tiny", *map(str, flags)])) == 0
    )


@pytest.fixture
def pairs(tmp_path):
    """Forty pairs of which the brighter image is preferred."""
    rng, lines = np.random.default_rng(0), []
    for number in range(40):
        for name, level in (("w", 190), ("l", 60)):
            pixels = np.clip(rng.normal(level, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}{name}.png")
        row = {"prompt": ["a cell", "a nucleus"][number % 2], "image_w": f"{number}w.png", "image_l": f"{number}l.png"}
        lines.append(json.dumps({**row, "who": "test", "when": "2026-01-01T00:00:00Z"}) + "\n")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(lines))
    return file


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_added_pairs_are_read_as_they_were_given(tmp_path):
    file = tmp_path / "new" / "pairs.jsonl"
    prompts = ["a cell", 'so-called "neutrophil"\u2028\n{"prompt": 1}', "Zellkern \u00e4 \U0001f9eb"]
    for number, prompt in enumerate(prompts):
        add_preference(file, prompt, png(200 + number), png(number), who="Ada" if number else "")
    found = load_preferences(file, 8)
    assert found.prompts == prompts
    assert found.better[:, 0, 0, 0].tolist() == [200, 201, 202] and found.worse[:, 0, 0, 0].tolist() == [0, 1, 2]
    first, second, _ = (json.loads(line) for line in file.read_text().splitlines())
    assert list(first) == ["prompt", "image_w", "image_l", "when"] and second["who"] == "Ada"
    assert datetime.now(timezone.utc) - datetime.fromisoformat(first["when"]) < timedelta(minutes=5)
    assert first["image_w"] == f"images/{hashlib.sha256(png(200)).hexdigest()}.png"
    assert (file.parent / first["image_w"]).read_bytes() == png(200)


def test_no_pair_of_twenty_writers_is_lost(tmp_path):
    """Five threads in each of four processes, of which several write the same images."""
    file = tmp_path / "pairs.jsonl"

    def write_five(number):
        with ThreadPoolExecutor(5) as threads:
            for each in range(5):
                threads.submit(add_preference, file, f"{number}-{each}", png(each), png(100), f"writer {each}")

    processes = [get_context("fork").Process(target=write_five, args=[number]) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = load_preferences(file, 8)
    assert sorted(found.prompts) == [f"{number}-{each}" for number in range(4) for each in range(5)]
    assert len(file.read_bytes().splitlines()) == 20
    assert len(list((tmp_path / "images").iterdir())) == 6  # and nothing half-written


def test_writer_killed_within_a_line_leaves_a_file_that_is_read_and_written(tmp_path):
    file = tmp_path / "pairs.jsonl"
    add_preference(file, "first", png(1), png(2))

    def die_in_the_middle():
        real = os.fsync

        def kill(descriptor):
            if os.path.realpath(f"/proc/self/fd/{descriptor}") == str(file.resolve()):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - 40)  # what the disk had got of the line
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = kill
        add_preference(file, "second", png(3), png(4))

    process = get_context("fork").Process(target=die_in_the_middle)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not file.read_bytes().endswith(b"\n")
    assert load_preferences(file, 8).prompts == ["first"]
    add_preference(file, "third", png(5), png(6))
    assert load_preferences(file, 8).prompts == ["first", "third"]


def test_wherever_the_last_line_was_cut_the_others_and_the_next_are_read(tmp_path):
    file = tmp_path / "pairs.jsonl"
    for prompt in ("first", "second"):
        add_preference(file, prompt, png(1), png(2))
    whole = file.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in (*range(start, len(whole), 9), len(whole) - 1, len(whole)):
        file.write_bytes(whole[:cut])
        kept = ["first", "second"] if cut >= len(whole) - 1 else ["first"]
        assert load_preferences(file, 8).prompts == kept
        add_preference(file, "third", png(1), png(2))
        assert load_preferences(file, 8).prompts == [*kept, "third"]


def test_pairs_are_not_added_where_nobody_may_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*pairs.jsonl"):
        add_preference(tmp_path / "file" / "pairs.jsonl", "a cell", png(1), png(2))


def test_pairs_are_read_and_each_pass_sees_all_of_them(pairs):
    found = load_preferences(pairs, 8)
    assert found.better.shape == found.worse.shape == (40, 8, 8, 3) and found.better.mean() > 150 > found.worse.mean()
    stream = preference_batches(found, 8, 0, 0)
    whole = torch.cat([next(stream)["better"] for _ in range(5)])
    expected = torch.as_tensor(found.better).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert sorted(whole.sum(dim=(1, 2, 3)).tolist()) == sorted(expected.sum(dim=(1, 2, 3)).tolist())
    later, shared = next(preference_batches(found, 8, 0, 5)), next(preference_batches(found, 8, 0, 2, 1, 2))
    assert torch.equal(later["better"], next(stream)["better"]) and torch.equal(shared["better"], later["better"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a cell", "image_w": "0w.png"}', "line 2 is no pair of images: it has no 'image_l'"),
        ('{"prompt": "a cell", "image_w": "../x.png", "image_l": "0l.png"}', r"\.\./x.png lies outside of"),
        ('{"prompt": "a cell", "image_w": "pairs.jsonl", "image_l": "0l.png"}', "pairs.jsonl is no image"),
        ("not json", "line 2 is no pair of images"),
        ("[1]", "line 2 is no pair of images"),
    ],
)
def test_bad_pairs_are_named(pairs, line, said):
    first = pairs.read_text().splitlines()[0]
    pairs.write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=said):
        load_preferences(pairs, 8)
    pairs.write_text("\n")
    with pytest.raises(ValueError, match="holds no pairs of images"):
        load_preferences(pairs, 8)


def test_scores_that_are_equal_say_log_two_and_the_loss_falls_with_the_right_order():
    equal = bradley_terry_loss(torch.zeros(3), torch.zeros(3))
    torch.testing.assert_close(equal, torch.tensor(2.0).log())
    assert (
        bradley_terry_loss(torch.ones(3), torch.zeros(3)) < equal < bradley_terry_loss(torch.zeros(3), torch.ones(3))
    )
    assert PreferenceHead(4)(torch.ones(5, 4), torch.ones(5, 4)).shape == (5,)


def test_a_reward_is_learned_from_pairs(pairs, tiny_dual_encoder_dir, tmp_path):
    flags = ("--preferences", pairs, "--alignment_model", tiny_dual_encoder_dir, "--output_dir", tmp_path / "run")
    run("train_reward.py", *flags, "--max_train_steps", 60, "--learning_rate", 0.01)
    record = json.loads((tmp_path / "run" / "reward" / "preference.json").read_text())
    assert record["heldout_accuracy"]["value"] == 1 and record["heldout_accuracy"]["n"] == 4
    reward = find_reward(f"preference:{tmp_path / 'run' / 'reward'}")
    bright, dark = torch.full((2, 3, 8, 8), 0.5).requires_grad_(), torch.full((2, 3, 8, 8), -0.5)
    prompts = ["a cell", "a nucleus"]
    assert (reward.score(bright, prompts) > reward.score(dark, prompts)).all()
    reward.score(bright + 0.01 * torch.randn(2, 3, 8, 8), prompts).sum().backward()
    assert bright.grad.abs().sum() > 0 and len(reward.sha256) == 2
    (tmp_path / "run" / "reward" / "preference.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load the preference reward"):
        find_reward(f"preference:{tmp_path / 'run' / 'reward'}")


def test_an_adapter_learns_what_is_preferred(pairs, tiny_pipeline_dir, tmp_path):
    flags = (
        "--preferences",
        pairs,
        "--pretrained_model_name_or_path",
        tiny_pipeline_dir,
        "--output_dir",
        tmp_path / "run",
    )
    flags += (
        "--target_modules",
        "conv_out",
        "conv2",
        "--learning_rate",
        0.02,
        "--checkpointing_steps",
        15,
        "--beta",
        20,
    )
    run("train_dpo_lora.py", *flags, "--max_train_steps", 30, "--train_batch_size", 16)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and np.mean(losses[-5:]) < 0.6
    options = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 1.0}
    means = []
    for lora in (None, str(tmp_path / "run" / "lora")):
        pipe, _ = load_pipeline(str(tiny_pipeline_dir), "cpu", lora=lora)
        pipe.set_progress_bar_config(disable=True)
        means.append(pipe(["a cell"] * 8, generator=torch.Generator().manual_seed(0), **options).images.mean())
    assert means[1] > means[0] + 0.02
    straight = load_file(tmp_path / "run" / "checkpoint-0000030" / "model.safetensors")
    flags = [str(each).replace("/run", "/stopped") for each in flags]
    run("train_dpo_lora.py", *flags, "--max_train_steps", 15, "--train_batch_size", 16)
    run(
        "train_dpo_lora.py",
        *flags,
        "--max_train_steps",
        30,
        "--train_batch_size",
        16,
        "--resume_from_checkpoint",
        "latest",
    )
    resumed = load_file(tmp_path / "stopped" / "checkpoint-0000030" / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_reward_judges_pairs_and_measures_an_adapter_that_learned_from_them(tiny_pipeline_dir, tmp_path, capsys):
    def measure(name, config_class, *flags):
        script = runpy.run_path(str(ROOT / "train_scripts" / name))
        return script["main"](script["parse"](script[config_class], {}, [*map(str, flags), "--num_processes", "1"]))

    model, prompts = ("--model", tiny_pipeline_dir), tmp_path / "prompts.txt"
    prompts.write_text("a cell\na nucleus\na vessel\n")
    asked = (*model, "--prompts", prompts, "--reward", "brightness", "--output_dir", tmp_path / "pairs")
    assert measure("draw_pairs.py", "PairsConfig", *asked, "--num_pairs", 5) == 0
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    found = load_preferences(pairs, 8)
    assert len(found.prompts) == 5 and set(found.prompts) == {"a cell", "a nucleus", "a vessel"}
    assert (found.better.mean(axis=(1, 2, 3)) >= found.worse.mean(axis=(1, 2, 3))).all()
    first = json.loads(pairs.read_text().splitlines()[0])
    assert first["who"] == "brightness"
    record = Image.open(pairs.parent / first["image_w"]).info
    assert record["synthetic"] == "true" and record["prompt"] == first["prompt"] and record["seed"] in ("0", "1")
    with pytest.raises(ValueError, match="is there already: choose another --output_dir"):
        measure("draw_pairs.py", "PairsConfig", *asked)

    flags = ("--pretrained_model_name_or_path", tiny_pipeline_dir, "--output_dir", tmp_path / "run")
    run("train_dpo_lora.py", "--preferences", pairs, *flags, "--max_train_steps", 2, "--train_batch_size", 4)
    output = tmp_path / "gain.json"
    asked = (*model, "--loras", f"dpo={tmp_path}/run/lora", "--rewards", "brightness", "--output", output)
    few = "--num_prompts", 22, "--num_images_per_prompt", 1
    assert measure("evaluate_reward.py", "EvaluateRewardConfig", *asked, *few) == 0
    entry = json.loads(output.read_text())["rewards"]["brightness"]
    assert entry["dpo"]["gain"]["n"] == 22 and 0 < entry["base"]["mean"] < 1 and output.with_suffix(".png").exists()
    assert entry["dpo"]["above_median"] == pytest.approx(0.5 + entry["dpo"]["more_above_median"]["value"])
    assert "brightness, dpo: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="loras are given as name=folder"):
        measure(
            "evaluate_reward.py",
            "EvaluateRewardConfig",
            "--loras",
            "dpo",
            "--rewards",
            "brightness",
            "--output",
            output,
        )


def test_choices_follow_the_scores():
    choose = runpy.run_path(str(ROOT / "train_scripts" / "draw_pairs.py"))["choose"]
    scores, rng = np.tile([[0.0, 1.0]], (4000, 1)), np.random.default_rng(0)
    assert (choose(scores, 0, rng) == 1).all() and (choose(scores[:, ::-1], 0, rng) == 0).all()
    assert choose(scores, 2.0, rng).mean() == pytest.approx(1 / (1 + np.exp(-1 / 2)), abs=0.03)
