"""Images drawn to be evaluated: which prompts, which seeds; resumable, and shared by several processes."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from visbio_diffusers.captions import CaptionBank, load_bank
from visbio_diffusers.data import ImageDataset
from visbio_diffusers.files import whole_file
from visbio_diffusers.load import load_pipeline


IMAGES_PER_PROMPT = 4  # of held-out wording


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Return `num_images` class indices, 0, 1, 2, ..., 0, 1, ...: as many of every class, give or take one."""
    return np.arange(num_images) % num_classes


def heldout_prompts(bank: CaptionBank, labels: np.ndarray) -> list[str]:
    """Return a held-out caption per label, going through those of its class in turn; empty if a class has none.

    Each caption is taken up to `IMAGES_PER_PROMPT` times in a row, so that it can be judged by itself.
    """
    captions = {label: bank.heldout_captions(int(label)) for label in np.unique(labels)}
    if not all(captions.values()):
        return []
    drawn = dict.fromkeys(captions, 0)
    prompts = []
    for label in labels:
        prompts.append(captions[label][drawn[label] // IMAGES_PER_PROMPT % len(captions[label])])
        drawn[label] += 1
    return prompts


class Order(NamedTuple):
    """What to draw: classes and prompts, and the same in held-out wording (empty where there is none)."""

    labels: np.ndarray
    prompts: list[str]
    wording_labels: np.ndarray
    wording_prompts: list[str]


def place_order(real: ImageDataset, num_images: int, num_wording_images: int, seed: int) -> Order:
    """Return as many prompts of every class of a set with a bank; else captions of its test images, at random."""
    if real.bank is None:
        order = np.random.default_rng(seed).permutation(len(real))
        rows = order[np.arange(num_images) % len(order)]
        return Order(real.labels[rows], [real.captions[row] for row in rows], rows[:0], [])
    bank = load_bank(real.bank)
    labels, wording_labels = (
        balanced_labels(number, len(bank.class_names)) for number in (num_images, num_wording_images)
    )
    prompts = [bank.plain_caption(int(label)) for label in labels]
    return Order(labels, prompts, wording_labels, heldout_prompts(bank, wording_labels))


class Drawn(NamedTuple):
    """Generated images: uint8 `(n, height, width, channels)`, and the median of the seconds that one of them took."""

    images: np.ndarray
    seconds_per_image: float


def generate_images(
    pipe: DiffusionPipeline,
    prompts: list[str],
    first_seed: int = 0,
    batch_size: int = 64,
    *,
    store: str | Path | None = None,
    **options,
) -> Drawn:
    """Draw one image per prompt; image i has a generator of its own with the seed `first_seed + i`.

    Args:
        pipe (`DiffusionPipeline`): on the device to use; any that takes `prompt`, `generator` and `output_type`.
        store (`str` or `Path`, *optional*): folder that keeps each batch. A call that was killed goes on from there,
            and the processes of `accelerate launch` share the batches; without it each process draws all.
        options: for the pipeline's call, such as `guidance_scale`.

    Raises:
        OSError: if a batch cannot be written.
    """
    pipe.set_progress_bar_config(disable=True)
    starts, state = range(0, len(prompts), batch_size), PartialState()
    draw = partial(_draw_batch, pipe, prompts, first_seed, batch_size, options)
    if store is None:
        batches = [draw(start) for start in tqdm(starts, desc="generating", unit="batch")]
    else:
        mine = starts[state.process_index :: state.num_processes]
        for start in tqdm(mine, desc="generating", unit="batch", disable=not state.is_main_process):
            if not _batch_file(store, start).exists():
                _write_batch(_batch_file(store, start), *draw(start))
        state.wait_for_everyone()
        batches = [_read_batch(_batch_file(store, start)) for start in starts]
    return Drawn(np.concatenate([images for images, _ in batches]), float(np.median([each for _, each in batches])))


def draw_on_cores(
    model: tuple, prompts: list[str], first_seed: int, batch_size: int, store: str | Path, processes: int, **options
) -> float | None:
    """Fill a store with the batches of [`generate_images`], by several processes on the CPU, each with its own model.

    The threads of this process are divided among them: two of one thread draw more than one of two.

    Args:
        model (`tuple`): arguments of [`load_pipeline`].
        processes (`int`): how many.
        prompts, first_seed, batch_size, store, options: see [`generate_images`].

    Returns:
        The highest memory that one of them held, in GB; None if nothing was left to draw, or where it is unknown.

    Raises:
        ValueError: if a process died, most likely for want of memory.
    """
    missing = [start for start in range(0, len(prompts), batch_size) if not _batch_file(store, start).exists()]
    if not missing:
        return None
    settings = model, max(1, torch.get_num_threads() // processes)
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=settings) as pool:
        work = [pool.submit(_work, prompts, first_seed, batch_size, options, start, store) for start in missing]
        try:
            bar = tqdm(as_completed(work), desc="generating", unit="batch", total=len(work))
            peaks = [done.result() for done in bar]
        except BrokenProcessPool as error:
            raise ValueError("a drawing process died, perhaps for want of memory: use --num_processes 1") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return None if None in peaks else max(peaks)


def stored_images(
    model: tuple, prompts: list[str], first_seed: int, batch_size: int, store: str | Path, processes: int
) -> np.ndarray:
    """Return images of prompts, uint8 `(n, height, width, channels)`; what the store has is not drawn again.

    Args:
        model, prompts, first_seed, batch_size, store, processes: see [`draw_on_cores`]; one process is this one.
    """
    if processes > 1:
        draw_on_cores(model, prompts, first_seed, batch_size, store, processes)
    pipe, _ = load_pipeline(*model)
    return generate_images(pipe, prompts, first_seed, batch_size, store=store).images


_worker: dict[str, DiffusionPipeline] = {}  # the pipeline of a process of `draw_on_cores`


def _start_worker(model: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker["pipe"], _ = load_pipeline(*model)
    _worker["pipe"].set_progress_bar_config(disable=True)


def _work(
    prompts: list[str], first_seed: int, batch_size: int, options: dict, start: int, store: str | Path
) -> float | None:
    drawn = _draw_batch(_worker["pipe"], prompts, first_seed, batch_size, options, start)
    _write_batch(_batch_file(store, start), *drawn)
    return peak_memory_gb()


def peak_memory_gb() -> float | None:
    """Return the highest memory that this process has held, in GB; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _draw_batch(
    pipe: DiffusionPipeline, prompts: list[str], first_seed: int, batch_size: int, options: dict, start: int
) -> tuple[np.ndarray, float]:
    """Return the images of the batch that begins at `start`, and the seconds per image."""
    batch, started = prompts[start : start + batch_size], time.perf_counter()
    generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))]
    images = pipe(prompt=batch, generator=generators, output_type="np", **options).images
    return (images * 255).round().astype(np.uint8), (time.perf_counter() - started) / len(batch)


def _write_batch(file: Path, images: np.ndarray, seconds: float) -> None:
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, images=images, seconds=seconds)


def _batch_file(store: str | Path, start: int) -> Path:
    return Path(store, f"{start:08d}.npz")


def _read_batch(file: Path) -> tuple[np.ndarray, float]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return content["images"], float(content["seconds"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"{file} is damaged: delete it and start the same command again") from error


def drawn_by(pipe: DiffusionPipeline, facts: dict) -> list:
    """Return what decides the images of a call that gives prompts and seeds alone, for [`store_name`].

    Args:
        pipe (`DiffusionPipeline`): that draws.
        facts (`dict`): what [`load_pipeline`] says of it.
    """
    scheduler, own = (
        {name: value for name, value in config.items() if not name.startswith("_") and not isinstance(value, tuple)}
        for config in (pipe.scheduler.config, pipe.config)
    )
    return [facts, type(pipe.scheduler).__name__, scheduler, own]


def store_name(*request: object) -> str:
    """Return a folder name for images that were asked for so: equal only for equal requests (JSON values)."""
    return hashlib.sha256(json.dumps(request, default=str).encode()).hexdigest()[:16]
