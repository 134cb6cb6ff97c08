"""Images drawn while a training runs, from fixed seeds, so that one sees it learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.training import trainable


logger = logging.getLogger(__name__)


@contextmanager
def averaged_weights(model, ema):
    """Let `model` have the averaged weights of `ema` (`EMAModel` or None) inside the block."""
    if ema is None:
        yield
        return
    parameters = trainable(model)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def validation_hook(
    accelerator,
    pipeline: Callable[[], Any],
    embed: Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]],
    ema,
    prompts: Sequence[str],
    num_images: int,
    every: int,
    folder: Path,
    adapter: bool = False,
) -> Callable[[int, dict], None]:
    """Return a hook for `fit` that every so many steps draws the prompts and shows them.

    Writes `folder`/step-*.png and sends the images to the tracker (TensorBoard or wandb). The training's random
    generators are not touched.

    Args:
        pipeline (`Callable`): returns a pipeline around the bare model that is being trained; it needs no text
            encoder.
        embed (`Callable`): an `EmbeddingCache` that holds `prompts` and the empty text.
        ema (`EMAModel`, *optional*): its weights are used.
        prompts (`Sequence[str]`): what to draw.
        num_images (`int`): images of each prompt, always from the same seeds.
        every (`int`): optimizer steps; 0, like an empty `prompts`, turns the hook off.
        adapter (`bool`): a LoRA adapter is trained; images without it stand beside those with it.
    """
    captions = [prompt for prompt in prompts for _ in range(num_images)]
    plain: list[Image.Image] = []  # without the adapter: drawn once, as they stay the same

    def draw(pipe) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)] * len(prompts)
        embeds = {"prompt_embeds": embed(captions)[0], "negative_prompt_embeds": embed([""] * len(captions))[0]}
        with torch.compiler.set_stance("force_eager"):  # other shapes than those that were compiled
            return pipe(**embeds, generator=generators).images

    def hook(step: int, metrics: dict) -> None:
        if not prompts or not every or step % every or not accelerator.is_main_process:
            return
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        training = pipe.unet.training
        pipe.unet.eval()
        if adapter and not plain:
            pipe.unet.disable_adapters()
            plain.extend(draw(pipe))
            pipe.unet.enable_adapters()
        with averaged_weights(pipe.unet, ema):
            images = draw(pipe)
        pipe.unet.train(training)
        titles = [f"{caption} (without adapter)" for caption in captions[: len(plain)]] + captions
        save_png(contact_sheet(plain + images, titles, columns=2 * num_images), folder / f"step-{step:07d}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                batch = np.stack([np.asarray(image.convert("RGB")) for image in images])
                tracker.log_images({"validation": batch}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": images}, step=step)

    return hook
