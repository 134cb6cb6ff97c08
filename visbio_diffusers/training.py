"""The one training loop: a stream of batches, a loss function, and plain functions as hooks."""

import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list, send_to_device
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from visbio_diffusers import checkpoints
from visbio_diffusers.config import TrainConfig
from visbio_diffusers.files import whole_file


if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

logger = get_logger(__name__)

TIME_IS_UP = 1  # a reason to stop beside the numbers of the signals caught
TIME_NAME = "training_time.json"

Metrics = dict[str, Any]
LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, Metrics]]
Hook = Callable[[int, Metrics], None]


class FitResult(NamedTuple):
    """How `fit` ended: the optimizer steps taken in all, and the number of the signal that stopped it, or 0."""

    step: int
    signum: int


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return an Accelerator for `config` after seeding all random generators; `fit` starts its tracker.

    Raises:
        ValueError: if the tracker of `report_to` is unknown or not installed, `accelerate launch` asks for another
            precision, or for FSDP or DeepSpeed.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", config.mixed_precision):
        raise ValueError(
            f"accelerate is set to {asked}, this training to {config.mixed_precision}: give "
            f"--mixed_precision {asked} to the script too, or --mixed_precision no to accelerate launch"
        )
    tracked = config.report_to != "none"
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # The default would cut the last optimizer step of an epoch short.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=config.report_to if tracked else None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir, "logs"))),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"{accelerator.distributed_type.value} is not supported: launch with --multi_gpu (DDP)")
    if tracked and not accelerator.log_with:
        raise ValueError(f"report_to={config.report_to}: not installed; pip install it, or use --report_to none")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        logger.warning("mixed_precision=fp16 needs a GPU; this training runs in fp32")
    _reseed(accelerator.device, config.seed)
    return accelerator


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    """Return AdamW over the trainable `parameters`, without weight decay on those of one dimension.

    Raises:
        ValueError: if none of them is trainable.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.adam_weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def make_lr_scheduler(optimizer: Optimizer, config: TrainConfig) -> LambdaLR:
    """Return the learning-rate schedule of `config`, counted in optimizer steps.

    Do not give it to `Accelerator.prepare`, which would step it once per process; `fit` steps and checkpoints it.
    """
    steps = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
    return get_scheduler(config.lr_scheduler, optimizer, **steps)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `model` that are trained: all of them, or those of its adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_ema(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> "EMAModel":
    """Return the moving average of what is trained of a prepared `model`, kept in checkpoints; see `ema_hook`.

    Its decay at step n is `min(ema_decay, n / (9 + n))`, and 0 at step 1.
    """
    from diffusers.training_utils import EMAModel  # imports every model of Diffusers: seconds

    ema = EMAModel(trainable(model), decay=config.ema_decay, foreach=True)
    checkpoints.register(accelerator, "ema", ema)
    return ema


def ema_hook(ema: "EMAModel", model: nn.Module) -> Hook:
    """Return a hook for `fit` that updates `ema` after each optimizer step."""
    parameters = trainable(model)
    return lambda step, metrics: ema.step(parameters)


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LambdaLR,
    stream: Callable[[int], Iterator[Any]],
    loss_fn: LossFunction,
    config: TrainConfig,
    hooks: Sequence[Hook] = (),
    round_steps: int = 1,
) -> FitResult:
    """Train until `config` has enough steps (`max_train_steps`) or minutes, the stream ends, or a signal asks to stop.

    A resumed run is bit-equal to an uninterrupted one if `stream` depends on its argument alone: random generators are
    seeded anew for every micro-batch. Writes config.json, checkpoints, loss.jsonl (one line per optimizer step) and
    training_time.json (the seconds that all steps up to the newest checkpoint took).

    Args:
        model, optimizer: as returned by `Accelerator.prepare`.
        lr_scheduler: not prepared (see `make_lr_scheduler`).
        stream: from the index of a micro-batch of this process to an endless iterator beginning there.
        loss_fn: from model and batch to the mean loss (scalar tensor) and a dict of numbers or scalar tensors to
            report; the same names at every call.
        hooks: called after each optimizer step, before a checkpoint is written, on every process, with the number of
            steps taken and the metrics of this process.
        round_steps (`int`): steps of a round, within which the stream cannot begin: a signal then ends the training at
            once, and the newest checkpoint is that of the last whole round.

    Raises:
        FloatingPointError: if the loss is no longer finite; nothing is saved then.
        ValueError: if `output_dir` holds checkpoints and `resume_from_checkpoint` is empty, or none is intact.
        OSError: if a checkpoint cannot be written.
    """
    checkpoints.register(accelerator, "lr_scheduler", lr_scheduler)
    checkpoints.unwrap_weights(accelerator)
    base_lrs = list(lr_scheduler.base_lrs)
    step = _begin(accelerator, config)
    _set_learning_rates(lr_scheduler, base_lrs)
    batches = stream(step * config.gradient_accumulation_steps)
    progress = tqdm(total=config.max_train_steps, initial=step, disable=not accelerator.is_main_process)
    model.train()
    rows: list[Metrics] = []  # metrics not yet fetched from the device
    signum, earlier = 0, _seconds_of_training(config) if step else 0.0
    began = started = time.perf_counter()
    with progress, _caught_signals() as caught:
        while step < config.max_train_steps and not signum:
            metrics = _optimizer_step(accelerator, model, optimizer, batches, loss_fn, config, step)
            if metrics is None:
                break
            metrics["lr"] = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            step += 1
            rows.append(metrics)
            progress.update()
            for hook in hooks:
                hook(step, metrics)
            logging_step, whole = step % config.logging_steps == 0, step % round_steps == 0
            seconds = earlier + time.perf_counter() - began
            # Agreement between processes waits for the device, so a GPU agrees only where it is waited for anyway.
            if accelerator.num_processes == 1 or logging_step or accelerator.device.type == "cpu":
                signum = _reason_to_stop(accelerator, config, caught, seconds, whole)
            saving = (signum and whole) or step == config.max_train_steps or step % config.checkpointing_steps == 0
            if logging_step or saving:
                _report(accelerator, config, step, rows, started, progress)
                rows.clear()
            if saving:
                _save(accelerator, config, step, seconds)
            if logging_step or saving:
                started = time.perf_counter()
    return FitResult(step, _explain_stop(config, signum, step, step % round_steps == 0))


def _explain_stop(config: TrainConfig, signum: int, step: int, whole_round: bool) -> int:
    """Log why a training has stopped, and return the number of the signal, or 0."""
    if signum == TIME_IS_UP:
        logger.info(f"{config.max_train_minutes:g} minutes are over: the training ends at step {step}")
        return 0
    if signum:
        kept = f"step {step} is saved" if whole_round else "the round is lost, what came before may be saved"
        logger.warning(f"{signal.strsignal(signum)}: {kept}; go on with --resume_from_checkpoint latest")
    return signum


def _seconds_of_training(config: TrainConfig) -> float:
    """Return what training_time.json says, 0 without one."""
    file = Path(config.output_dir, TIME_NAME)
    return json.loads(file.read_text())["seconds"] if file.exists() else 0.0


def _save(accelerator: Accelerator, config: TrainConfig, step: int, seconds: float) -> None:
    """Write a checkpoint, and how long the training has taken."""
    checkpoints.save(accelerator, config.output_dir, step, config.checkpoints_total_limit)
    if accelerator.is_main_process:
        with whole_file(Path(config.output_dir, TIME_NAME)) as temporary:
            temporary.write_text(json.dumps({"seconds": seconds}) + "\n")


def _set_learning_rates(lr_scheduler: LambdaLR, base_lrs: list[float]) -> None:
    """Let the settings say the learning rates, and not the checkpoint: a resumed run may go on with a lower one."""
    groups, lambdas = lr_scheduler.optimizer.param_groups, lr_scheduler.lr_lambdas
    lr_scheduler.base_lrs = base_lrs
    for group, base_lr, factor in zip(groups, base_lrs, lambdas, strict=True):
        group["initial_lr"], group["lr"] = base_lr, base_lr * factor(lr_scheduler.last_epoch)
    lr_scheduler._last_lr = [group["lr"] for group in groups]


def _optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[Any],
    loss_fn: LossFunction,
    config: TrainConfig,
    step: int,
) -> Metrics | None:
    """Take one optimizer step and return its metrics, averaged over the micro-batches, still on the device.

    None where the stream has ended, which it does between two steps.
    """
    device, metrics = accelerator.device, {}
    for micro_batch in range(config.gradient_accumulation_steps):
        _reseed(device, config.seed, step, micro_batch, accelerator.process_index)
        batch = next(batches, None)
        if batch is None:
            return None
        batch = send_to_device(batch, device, non_blocking=True)
        with accelerator.accumulate(model):
            loss, extra = loss_fn(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in {"loss": loss, **extra}.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            metrics[name] = metrics.get(name, 0.0) + value / config.gradient_accumulation_steps
    assert accelerator.sync_gradients, "the optimizer step must end with the last micro-batch"
    return {**metrics, "grad_norm": grad_norm}


def _reseed(device: torch.device, *entropy: int) -> None:
    """Seed all generators in use from a few integers, so that noise depends on its place in the run alone."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also queue a call for every kind of device that is absent, at a cost of time and memory.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _report(
    accelerator: Accelerator, config: TrainConfig, step: int, rows: list[Metrics], started: float, progress: tqdm
) -> None:
    """Fetch the collected metrics once, average them over processes, write and show them, and stop if not finite."""
    device, names = accelerator.device, [name for name in rows[0] if name != "lr"]
    table = torch.stack([torch.stack([torch.as_tensor(row[n], device=device).float() for n in names]) for row in rows])
    columns = dict(zip(names, accelerator.reduce(table, "mean").T.tolist(), strict=True))  # waits for the device
    seconds = time.perf_counter() - started
    lines, bad = [], ""
    for index, row in enumerate(rows):
        line = {"step": step - len(rows) + 1 + index, "loss": columns["loss"][index]}
        line |= {"grad_norm": columns["grad_norm"][index], "lr": row["lr"]}
        if accelerator.scaler is not None and not math.isfinite(line["grad_norm"]):
            line["grad_norm"] = None  # fp16 gradients overflowed and the step was skipped: no harm
        bad = next((name for name, value in line.items() if value is not None and not math.isfinite(value)), "")
        if bad:
            break
        lines.append(json.dumps(line) + "\n")
    if accelerator.is_main_process:
        checkpoints.append_log(Path(config.output_dir, "loss.jsonl"), lines)
    if bad:
        raise FloatingPointError(
            f"{bad} is {line[bad]} at step {line['step']}; newest intact checkpoint: "
            f"{checkpoints.latest(config.output_dir) or 'none'}; lower --learning_rate or use --mixed_precision bf16, "
            "then --resume_from_checkpoint latest"
        )
    images = len(rows) * config.gradient_accumulation_steps * config.train_batch_size * accelerator.num_processes
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    means |= {"lr": rows[-1]["lr"], "images_per_second": images / seconds}
    progress.set_postfix({"loss": f"{means['loss']:.4f}", "images/s": f"{images / seconds:.1f}"})
    accelerator.log(means, step=step)


def _begin(accelerator: Accelerator, config: TrainConfig) -> int:
    """Load the checkpoint that `config` asks for, open the logs, and return the step to go on from."""
    output_dir, found = Path(config.output_dir), [""]
    if accelerator.is_main_process:
        found[0] = str(checkpoints.to_resume(output_dir, config.resume_from_checkpoint) or "")
        output_dir.mkdir(parents=True, exist_ok=True)
        config.save(output_dir / "config.json")
    broadcast_object_list(found)
    step = checkpoints.step_of(found[0]) if found[0] else 0
    if found[0]:
        accelerator.load_state(found[0])
        accelerator.step = 0  # its count of micro-batches; every optimizer step starts a new one
        logger.info(f"resumed {found[0]}")
    if accelerator.is_main_process:
        checkpoints.truncate_log(output_dir / "loss.jsonl", step)
    if config.report_to != "none":
        simple = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(config).items()}
        accelerator.init_trackers("visbio-diffusers", config=simple)
    return step


def _reason_to_stop(
    accelerator: Accelerator, config: TrainConfig, caught: list[int], seconds: float, whole_round: bool
) -> int:
    """Return the reason to stop that any process has, the same on all of them, or 0; a begun round is never late."""
    late = whole_round and 0 < config.max_train_minutes < seconds / 60
    signum = max(caught, default=TIME_IS_UP if late else 0)
    if accelerator.num_processes == 1:
        return signum
    return int(accelerator.gather(torch.tensor([signum], device=accelerator.device)).max())


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying; a second one acts as usual, so that a hung run can be ended."""
    caught: list[int] = []
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def handle(signum: int, frame: Any) -> None:
        caught.append(signum)
        signal.signal(signum, previous[signum])

    for signum in previous:
        signal.signal(signum, handle)
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
