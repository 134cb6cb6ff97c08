"""The training loop on a tiny regression. Run as a script, this file is a training that can be killed or launched."""

import importlib.util
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from visbio_diffusers.config import TrainConfig, parse, run
from visbio_diffusers.training import ema_hook, fit, make_accelerator, make_ema, make_lr_scheduler, make_optimizer


ROOT = Path(__file__).parents[1]
# Two micro-batches of 3 out of 20 samples: every optimizer step but each tenth begins in the middle of an epoch.
SETTINGS = {
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 8,
    "learning_rate": 1e-2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "checkpointing_steps": 5,
    "logging_steps": 3,
    "report_to": "none",
}


def _stream(config, rank=0):
    samples = torch.randn(20, 4, generator=torch.Generator().manual_seed(rank))

    def stream(start):
        while True:
            rows = [(start * config.train_batch_size + i) % 20 for i in range(config.train_batch_size)]
            yield {"clean": samples[rows], "caption": ["a cell"] * len(rows)}
            start += 1

    return stream


def _denoising_loss(model, batch):
    noise = torch.randn_like(batch["clean"])
    return (model(batch["clean"] + noise) - noise).square().mean(), {"noise_std": noise.std()}


def _train(
    config, loss_fn=_denoising_loss, hooks=(), watch=lambda optimizer: None, alter=lambda accelerator: None, stop=None,
    round_steps=1,
):  # fmt: skip
    """Train the tiny model and return the prepared model, the averaged weights and the result of `fit`."""
    AcceleratorState._reset_state(reset_partial_state="RANK" not in os.environ)
    GradientState._reset_state()
    accelerator = make_accelerator(config)
    alter(accelerator)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    optimizer = make_optimizer(model.parameters(), config)
    watch(optimizer)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = make_ema(accelerator, model, config) if config.use_ema else None
    endless = _stream(config, accelerator.process_index)
    hooks = [ema_hook(ema, model), *hooks] if ema else hooks

    def stream(start):
        return itertools.islice(endless(start), None if stop is None else stop - start)

    result = fit(accelerator, model, optimizer, lr_scheduler, stream, loss_fn, config, hooks, round_steps)
    return model, ema, result


def _config(folder, **settings):
    return TrainConfig(output_dir=str(folder), **{**SETTINGS, **settings})


def _signal_at(step, signum):
    return lambda current, metrics: os.kill(os.getpid(), signum) if current == step else None


def _state(folder, step=8):
    """Return the bytes that must not depend on where a run was interrupted."""
    names = ("model.safetensors", "optimizer.bin", "ema.pt", "lr_scheduler.pt")
    files = [folder / f"checkpoint-{step:07d}" / name for name in names]
    return [file.read_bytes() for file in (*files, folder / "loss.jsonl")]


def _python(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    _train(_config(folder))
    return folder


def test_a_killed_run_resumes_to_the_same_bits(straight, tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    # Killed after the checkpoint of step 5, once more steps were taken than saved.
    killed = _python(__file__, "--output_dir", str(tmp_path), "--config", str(settings), KILL_AT="7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "checkpoint-0000008").exists()
    _train(_config(tmp_path, resume_from_checkpoint="latest"))
    assert _state(tmp_path) == _state(straight)


def test_a_training_ends_where_its_stream_does(tmp_path):
    _, _, result = _train(_config(tmp_path), stop=12)
    assert (result.step, result.signum) == (6, 0)


def test_within_a_round_a_signal_ends_at_once_and_saves_nothing_but_time_waits_for_its_end(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        _, _, result = _train(_config(tmp_path / "a"), hooks=[_signal_at(7, signal.SIGTERM)], round_steps=5)
    assert (result.step, result.signum) == (7, signal.SIGTERM)
    assert [file.name for file in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-0000005"]
    assert "the round is lost" in caplog.text
    _, _, result = _train(_config(tmp_path / "b", max_train_minutes=1e-9), round_steps=5)
    assert (result.step, result.signum) == (5, 0)


def test_a_training_ends_as_if_done_when_its_time_is_up(tmp_path):
    _, _, result = _train(_config(tmp_path, max_train_minutes=1e-9))
    assert (result.step, result.signum) == (1, 0)
    assert (tmp_path / "checkpoint-0000001").is_dir()
    first = json.loads((tmp_path / "training_time.json").read_text())["seconds"]
    _, _, result = _train(_config(tmp_path, max_train_minutes=60, resume_from_checkpoint="latest"))
    assert result.step == 8
    assert json.loads((tmp_path / "training_time.json").read_text())["seconds"] > first > 0
    _, _, result = _train(
        _config(tmp_path, max_train_steps=20, max_train_minutes=1e-9, resume_from_checkpoint="latest")
    )
    assert result.step == 9  # the time of all starts counts


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(signum, straight, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, _, result = _train(_config(tmp_path), hooks=[_signal_at(4, signum)])
    assert (result.step, result.signum) == (4, signum)
    assert ": step 4 is saved; go on with --resume_from_checkpoint latest" in caplog.text
    _train(_config(tmp_path, resume_from_checkpoint="latest"))
    assert _state(tmp_path) == _state(straight)


def test_a_damaged_checkpoint_is_said_and_the_one_before_resumed(straight, tmp_path, caplog):
    _train(_config(tmp_path))
    os.truncate(tmp_path / "checkpoint-0000008" / "optimizer.bin", 100)
    with caplog.at_level(logging.WARNING):
        _, _, result = _train(_config(tmp_path, resume_from_checkpoint="latest"))
    assert "checkpoint-0000008 is damaged: optimizer.bin" in caplog.text
    assert result.step == 8 and _state(tmp_path) == _state(straight)


def test_a_fresh_start_does_not_mix_with_an_earlier_run(tmp_path):
    _train(_config(tmp_path))
    before = _state(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-0000008 of an earlier run"):
        _train(_config(tmp_path, seed=1))
    assert _state(tmp_path) == before


def test_batch_size_times_accumulation_is_what_counts(tmp_path):
    def loss_with_given_noise(model, batch):
        return (model(batch["clean"].flip(1)) - batch["clean"]).square().mean(), {}

    final = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        config = _config(tmp_path / str(batch), train_batch_size=batch, gradient_accumulation_steps=accumulation)
        model, _, _ = _train(config, loss_with_given_noise)
        final.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (final[0] - final[1]).abs().max() < 1e-6
    assert (final[0] - final[2]).abs().max() < 1e-6


def test_gradients_are_clipped_where_the_optimizer_sees_them(tmp_path):
    seen, reported = [], []

    def watch(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        )

    hooks = [lambda step, metrics: reported.append(metrics["grad_norm"].item())]
    _train(_config(tmp_path, max_grad_norm=0.1), hooks=hooks, watch=watch)
    assert len(seen) == 8 and max(seen) <= 0.1 + 1e-6 and min(reported) > 0.1


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        loss, metrics = _denoising_loss(model, batch)
        return loss * (math.nan if len(calls) > 2 * 6 else 1.0), metrics

    with pytest.raises(FloatingPointError, match="loss is nan at step 7; .*checkpoint-0000005; lower --learning_rate"):
        _train(_config(tmp_path), loss_fn)
    assert not (tmp_path / "checkpoint-0000008").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "loss.jsonl").open()] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_may_go_on_with_another_learning_rate(tmp_path):
    _train(_config(tmp_path, max_train_steps=4, learning_rate=0.1, use_ema=False))
    seen = []
    config = _config(tmp_path, max_train_steps=6, learning_rate=0.01, resume_from_checkpoint="latest", use_ema=False)
    _train(config, hooks=[lambda step, metrics: seen.append(metrics["lr"])])
    expected = make_lr_scheduler(make_optimizer([nn.Parameter(torch.ones(1))], config), config).lr_lambdas[0]
    assert seen == pytest.approx([0.01 * expected(4), 0.01 * expected(5)])


def test_what_accelerate_launch_asks_for_is_not_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="give --mixed_precision bf16 to the script too"):
        make_accelerator(_config(tmp_path))


def test_average_of_the_weights_by_hand(tmp_path):
    """At step n the decay is 0 for n = 1, else n / (9 + n), at most `ema_decay`."""
    expected = None

    def follow(step, metrics):
        nonlocal expected
        decay = 0.0 if step == 1 else min(0.3, step / (9 + step))
        current = model_of[0].weight.detach().clone()
        expected = current if expected is None else decay * expected + (1 - decay) * current

    model_of = []

    def loss_fn(model, batch):
        model_of[:] = [model[0]]
        return _denoising_loss(model, batch)

    _, ema, _ = _train(_config(tmp_path, ema_decay=0.3), loss_fn, hooks=[follow])
    torch.testing.assert_close(ema.shadow_params[0], expected)


def test_weight_decay_spares_biases_and_frozen_parameters():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    decayed, spared = make_optimizer(model.parameters(), _config("out")).param_groups
    assert (decayed["weight_decay"], len(decayed["params"])) == (1e-2, 1)
    assert (spared["weight_decay"], len(spared["params"])) == (0.0, 3)
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_optimizer(model[2].parameters(), _config("out"))


def test_tracker_receives_the_mean_loss(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _train(_config(tmp_path, report_to="tensorboard", mixed_precision="bf16"))
    events = EventAccumulator(str(tmp_path / "logs" / "visbio-diffusers"))
    events.Reload()
    first = events.Scalars("loss")[0]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "loss.jsonl").open()]
    assert first.step == 3 and first.value == pytest.approx(sum(losses[:3]) / 3)
    assert {"grad_norm", "lr", "noise_std", "images_per_second"} <= set(events.Tags()["scalars"])


def test_fp16_overflow_does_no_harm_and_resumes_to_the_same_bits(tmp_path):
    def with_scaler(accelerator):  # Accelerate scales on GPUs only; torch can on a CPU, too
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)

    files = []
    for folder, stops in ((tmp_path / "straight", ()), (tmp_path / "resumed", (_signal_at(3, signal.SIGTERM),))):
        config = _config(folder, mixed_precision="fp16", resume_from_checkpoint="latest")
        _train(config, hooks=stops, alter=with_scaler)
        _train(config, alter=with_scaler)
        files.append([*_state(folder), (folder / "checkpoint-0000008" / "scaler.pt").read_bytes()])
    assert files[0] == files[1]
    log = [json.loads(line) for line in (tmp_path / "straight" / "loss.jsonl").open()]
    skipped = [line["step"] for line in log if line["grad_norm"] is None]
    assert skipped[:2] == [1, 2] and len(skipped) < 6 and log[-1]["loss"] < 2


def test_fp16_without_a_gpu_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _train(_config(tmp_path, mixed_precision="fp16", max_train_steps=1))
    assert "mixed_precision=fp16 needs a GPU" in caplog.text


@pytest.mark.parametrize("tracker", ["pencil", "wandb"])
def test_a_tracker_that_is_not_there_is_said(tracker, tmp_path):
    if tracker == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match=tracker):
        _train(_config(tmp_path / "out", report_to=tracker))
    assert not (tmp_path / "out").exists()


def test_two_processes_agree_and_count_optimizer_steps(straight, tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({**SETTINGS, "use_ema": False}))  # its import would take longest
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # `accelerate launch` needs GPUs
    script = (__file__, "--output_dir", str(tmp_path / "out"), "--config", str(settings))
    launched = _python(*launch, *script, WEIGHTS_TO=str(tmp_path), ACCELERATE_USE_CPU="true")
    assert launched.returncode == 0, launched.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["seed"] != second["seed"]  # each process draws its own noise
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    alone, together = (
        [json.loads(line) for line in (folder / "loss.jsonl").open()] for folder in (straight, tmp_path / "out")
    )
    assert [line["lr"] for line in together] == [line["lr"] for line in alone]
    # Saved under the bare names, so one process can go on where two stopped.
    config = _config(tmp_path / "out", resume_from_checkpoint="latest", max_train_steps=9, use_ema=False)
    assert _train(config)[2].step == 9


def main(config):
    """Train as told by the environment: KILL_AT names a step to die at, WEIGHTS_TO a folder for the weights."""
    kill = _signal_at(int(os.environ.get("KILL_AT", -1)), signal.SIGKILL)
    model, _, result = _train(config, hooks=[kill])
    if "WEIGHTS_TO" in os.environ:
        state = {"weights": [p.detach() for p in model.parameters()], "seed": torch.initial_seed()}
        torch.save(state, Path(os.environ["WEIGHTS_TO"], f"rank{os.environ['RANK']}.pt"))
    return result.signum


if __name__ == "__main__":
    run(main, parse(TrainConfig, {}))
