"""Images drawn to be evaluated: which prompts, which seeds; resumable, and shared by several processes."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from visbio_diffusers.files import whole_file


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from visbio_diffusers.captions import CaptionBank


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Return `num_images` class indices, 0, 1, 2, ..., 0, 1, ...: as many of every class, give or take one."""
    return np.arange(num_images) % num_classes


def heldout_prompts(bank: CaptionBank, labels: np.ndarray) -> list[str]:
    """Return a held-out caption per label, going through those of its class in turn; empty if a class has none."""
    captions = {label: bank.heldout_captions(int(label)) for label in np.unique(labels)}
    if not all(captions.values()):
        return []
    drawn = dict.fromkeys(captions, 0)
    prompts = []
    for label in labels:
        prompts.append(captions[label][drawn[label] % len(captions[label])])
        drawn[label] += 1
    return prompts


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
    state = PartialState()
    starts = range(0, len(prompts), batch_size)
    mine = starts if store is None else starts[state.process_index :: state.num_processes]
    drawn: dict[int, tuple[np.ndarray, float]] = {}
    for start in tqdm(mine, desc="generating", unit="batch", disable=store is not None and not state.is_main_process):
        file = store and Path(store, f"{start:08d}.npz")
        if file and file.exists():
            continue
        batch, started = prompts[start : start + batch_size], time.perf_counter()
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))]
        images = pipe(prompt=batch, generator=generators, output_type="np", **options).images
        images = (images * 255).round().astype(np.uint8)
        drawn[start] = images, (time.perf_counter() - started) / len(batch)
        if file:
            with whole_file(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, images=images, seconds=drawn[start][1])
    if store is not None:
        state.wait_for_everyone()
        drawn = {start: _read_batch(Path(store, f"{start:08d}.npz")) for start in starts}
    batches = [drawn[start] for start in starts]
    return Drawn(np.concatenate([images for images, _ in batches]), float(np.median([each for _, each in batches])))


def _read_batch(file: Path) -> tuple[np.ndarray, float]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return content["images"], float(content["seconds"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"{file} is damaged: delete it and start the same command again") from error


def store_name(*request: object) -> str:
    """Return a folder name for images that were asked for so: equal only for equal requests (JSON values)."""
    return hashlib.sha256(json.dumps(request, default=str).encode()).hexdigest()[:16]
