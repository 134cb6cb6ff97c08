"""The models behind the page, one drawing at a time, and the limits of what a visitor may ask for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.alignment.command import DEFAULT_ENCODER
from visbio_diffusers.alignment.dual_encoder import DualEncoder, load_dual_encoder
from visbio_diffusers.captions import load_bank
from visbio_diffusers.cards import base_of, is_adapter
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.data.photograph import read_photograph
from visbio_diffusers.files import one_line
from visbio_diffusers.generate import Studio, open_studio
from visbio_diffusers.load import default_model, load_pipeline


MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_SCALE = 8, 50, 10.0, 2.0
MAX_SEED = 2**32 - 1
MAX_PROMPT = 1000  # characters
MAX_PIXELS = 4096**2  # of an upload
OWN_SCHEDULER, NO_ADAPTER = "the model's own", "none"
SCHEDULERS = {
    OWN_SCHEDULER: "",
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "DEIS": "DEISMultistepScheduler",
}


class Reference(NamedTuple):
    """Real images `(n, height, width, channels)`, uint8, in the form of the model's, and what is known of each."""

    name: str
    images: np.ndarray
    captions: list[str]


class Models:
    """A pipeline, its adapters, a dual encoder and a reference set, each loaded when it is first asked for.

    Args:
        model (`str`, *optional*), device (`str`, *optional*): see `load_pipeline`.
        adapters (`Sequence[str]`): LoRA adapters to choose from; those that lie beside the model that comes with the
            package are added to them.
        reference (`str`): set whose training images are shown beside drawn ones, see `load_image_dataset`; "" is none.

    Raises:
        ValueError, OSError: if the model, an adapter or the set cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        adapters: Sequence[str] = (),
        device: str | None = None,
        reference: str = "",
    ):
        self._model, self._device = model, device
        self._lock = threading.RLock()
        self._adapters = {"/".join(Path(each).parts[-2:]): each for each in adapters}
        self._loaded: dict[str, tuple[VisBioPipeline, dict[str, str]]] = {}
        self._encoder: DualEncoder | None = None
        for name in (*self._adapters, NO_ADAPTER):  # a wrong one is known at the start
            self._load(name)
        pipe, self.facts = self._loaded[NO_ADAPTER]
        if model is None:
            beside = sorted(place for place in default_model().parent.iterdir() if is_adapter(place))
            self._adapters |= {place.name: str(place) for place in beside if base_of(place) is None}
        banks = filter(None, self.facts.get("caption_banks", "").split(", "))
        self.examples = [text for bank in banks for text in _plain_captions(bank)] or ["a cell"]
        self.defaults = {name: pipe.config[name] for name in ("num_inference_steps", "guidance_scale")}
        config = pipe.unet.config
        self.reference = _load_reference(reference, config.sample_size, config.in_channels) if reference else None

    @property
    def adapters(self) -> list[str]:
        """Names to choose from; the first is none."""
        return [NO_ADAPTER, *self._adapters]

    @contextmanager
    def studio(
        self,
        adapter: str = NO_ADAPTER,
        scale: float = 1.0,
        scheduler: str = OWN_SCHEDULER,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Iterator[Studio]:
        """Give the means to draw, to one caller at a time; the arguments are checked, whoever sends them.

        Steps and guidance are the model's own for None.

        Raises:
            ValueError: for names that are no choices, and numbers out of range.
        """
        check_choice("LoRA", adapter, self.adapters)
        check_choice("scheduler", scheduler, list(SCHEDULERS))
        check_number("LoRA scale", scale, 0, MAX_SCALE)
        chosen = {}
        if steps is not None:
            check_whole("steps", steps, 1, MAX_STEPS)
            chosen["num_inference_steps"] = int(steps)
        if guidance_scale is not None:
            check_number("guidance scale", guidance_scale, 1, MAX_GUIDANCE)
            chosen["guidance_scale"] = float(guidance_scale)
        with self._lock:
            pipe, facts = self._load(adapter)
            if adapter != NO_ADAPTER:
                pipe.set_adapters("lora", float(scale))
                facts = {**facts, "lora_scale": f"{scale:g}"}
            if scheduler != OWN_SCHEDULER:
                kind = getattr(diffusers, SCHEDULERS[scheduler])
                pipe = VisBioPipeline.from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config))
            yield open_studio(pipe, facts, MAX_IMAGES, **chosen)

    @property
    def encoder(self) -> DualEncoder:
        """The dual encoder that comes with the package."""
        with self._lock:
            if self._encoder is None:
                self._encoder = load_dual_encoder(str(default_model(DEFAULT_ENCODER)), self._device)
            return self._encoder

    def _load(self, adapter: str) -> tuple[VisBioPipeline, dict[str, str]]:
        """Return the pipeline with an adapter; the one without, and that of the last adapter, stay in memory."""
        if adapter not in self._loaded:
            lora = self._adapters.get(adapter)
            pipe, facts = load_pipeline(self._model, self._device, lora=lora)
            if not isinstance(pipe, VisBioPipeline):
                raise ValueError(f"the page needs a model that denoises pixels, and {facts['model']} is another kind")
            self._loaded = {name: self._loaded[name] for name in self._loaded if name == NO_ADAPTER}
            self._loaded[adapter] = pipe, facts
        return self._loaded[adapter]


def _plain_captions(bank_name: str) -> list[str]:
    bank = load_bank(bank_name)
    if bank.no_finding is not None:  # several labels an image
        labels: list[Any] = np.eye(len(bank.classes), dtype=int).tolist()
    else:
        labels = list(range(len(bank.classes)))
    return [bank.plain_caption(label) for label in labels]


def _load_reference(name: str, resolution: int, channels: int) -> Reference:
    found = load_image_dataset(name, "train", resolution=resolution, channels=channels, bare=True)
    images = np.stack([found[row]["image"] for row in range(len(found))])
    captions = [f"image {row}" for row in range(len(found))]
    if found.class_names and found.labels is not None and found.labels.ndim == 1:
        captions = [f"{found.class_names[label]}, {text}" for label, text in zip(found.labels, captions)]
    return Reference(Path(name).stem, images, captions)


def check_prompt(prompt: Any, name: str = "prompt", allow_empty: bool = False) -> str:
    """Return a prompt without spaces around it.

    Raises:
        ValueError: if it is empty, too long to be one, or no text.
    """
    if not isinstance(prompt, str) or not (allow_empty or prompt.strip()):
        raise ValueError(f"the {name} is empty: describe an image, or choose an example")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the {name} has {len(prompt):,} characters: write at most {MAX_PROMPT:,}")
    return prompt.strip()


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise a ValueError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, but is {str(value)[:40]!r}")


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise a ValueError unless `value` is a whole number from `low` to `high`."""
    check_number(name, value, low, high)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, but is {value}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"no {name} {str(value)[:40]!r}: choose {', '.join(choices)}")


def read_upload(file: str | None) -> Image.Image:
    """Read an image that a visitor has sent, of at most MAX_PIXELS.

    Raises:
        ValueError: if there is none, or it cannot be read; the message names the file without its folder.
    """
    if not file:
        raise ValueError("there is no image yet: upload one")
    try:
        return read_photograph(file, MAX_PIXELS)
    except (ValueError, OSError) as error:
        raise ValueError(one_line(error).replace(str(file), Path(file).name)) from error


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """Give a list to which the warnings of the pipelines are added, such as that of a prompt that was cut."""
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger("visbio_diffusers.pipelines")
    source.addHandler(listener)
    try:
        yield heard
    finally:
        source.removeHandler(listener)
