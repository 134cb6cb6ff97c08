"""Rewards: how much an image is worth, given its prompt.

[`find_reward`] takes a name, `module:function` of one's own, `min(A, B)`, or a weighted sum `A + 0.5 * B`. A function
gets images `(n, channels, height, width)` in [-1, 1] and their n prompts, and returns n numbers.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from visbio_diffusers.alignment import load_dual_encoder
from visbio_diffusers.alignment.preference import load_head
from visbio_diffusers.alignment.zero_shot import caption_ensembles, class_embeds
from visbio_diffusers.captions import load_bank
from visbio_diffusers.files import digest, one_line
from visbio_diffusers.load import default_model, download_files, main_weights, quiet_loading


Score = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]

ALIGNMENT_MODEL = "visbio-align-blood"
JPEG_QUALITY = 95


class Reward(NamedTuple):
    """A reward and what is to be known of it.

    Args:
        name (`str`): as it was asked for.
        score (`Callable`): from images and prompts to `(n,)`.
        differentiable (`bool`): whether gradients flow back to the images.
        sha256 (`tuple[str, ...]`): digests of the weights of the models behind it, which may judge no more.
    """

    name: str
    score: Score
    differentiable: bool = False
    sha256: tuple[str, ...] = ()


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return the mean of all values, in [0, 1]; differentiable."""
    return (images.mean(dim=(1, 2, 3)) + 1) / 2


def jpeg_incompressibility(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return the size of each image as JPEG of quality 95, in kilobytes; not differentiable.

    Source: Black et al. 2024, Training Diffusion Models with Reinforcement Learning, section 5.2.
    """
    return torch.tensor([_jpeg_bytes(each) / 1000 for each in _bytes(images)])


def jpeg_compressibility(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return minus the size as JPEG, in kilobytes; see [`jpeg_incompressibility`]."""
    return -jpeg_incompressibility(images, prompts)


def stain_hue(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return how purple an image is, in [-1, 1]: mean of (red + blue) / 2 less green; differentiable."""
    red, green, blue = images[:, :3].unbind(dim=1) if images.shape[1] >= 3 else (images[:, 0],) * 3
    return ((red + blue) / 2 - green).mean(dim=(1, 2)) / 2


def nucleus_area(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return the share of an image that is darker than Otsu's threshold, in [0, 1]; not differentiable.

    In stained cells those are the nuclei. Source: scikit-image's `threshold_otsu`.
    """
    return torch.tensor([float(mask.mean()) for mask in _dark(images)])


def cell_count(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return the number of connected parts on the side of Otsu's threshold that covers less; not differentiable.

    Parts below 0.2 % of the image are left out. Source: scikit-image's `threshold_otsu` and `label`.
    """
    from skimage.measure import label  # an extra

    counts = []
    for mask in _dark(images):
        mask = mask if mask.mean() <= 0.5 else ~mask
        sizes = np.bincount(label(mask).ravel())[1:]
        counts.append(float((sizes > 0.002 * mask.size).sum()))
    return torch.tensor(counts)


def _dark(images: torch.Tensor) -> list[np.ndarray]:
    """Return which pixels of each image are darker than Otsu's threshold, none of an image of one colour."""
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ValueError('this reward needs scikit-image: pip install "visbio_diffusers[train]"') from error
    grey = [each.astype(np.float32).mean(axis=2) for each in _bytes(images)]
    return [each < threshold_otsu(each) if np.ptp(each) > 0 else np.zeros(each.shape, bool) for each in grey]


def _bytes(images: torch.Tensor) -> np.ndarray:
    """Return images as uint8 `(n, height, width, channels)`."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _jpeg_bytes(pixels: np.ndarray) -> int:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


def similarity(encoder) -> Score:
    """Return the reward of a `DualEncoder`: the cosine of image and prompt, in [-1, 1]; differentiable."""
    embed, known = _image_rows(encoder), _Known(encoder.embed_texts)
    return lambda images, prompts: (embed(images) * known(prompts).to(images.device)).sum(dim=1)


def zero_shot(encoder) -> Score:
    """Return the reward of a `DualEncoder` with a caption bank: how sure it is of the class that a prompt means.

    The log of the probability, below 0, which zero-shot classification into the classes and subtypes of the bank
    gives to the class whose captions are nearest to the prompt; differentiable. Unlike a cosine it does not rise with
    what all classes have in common.

    Raises:
        ValueError: if the model knows no bank.
    """
    if not encoder.caption_bank:
        raise ValueError(f"{encoder.name} has no caption bank of its own, whose classes a prompt could mean")
    classes = class_embeds(encoder, list(caption_ensembles(load_bank(encoder.caption_bank), subtypes=True).values()))
    embed, known = _image_rows(encoder), _Known(encoder.embed_texts)

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        meant = (known(prompts) @ classes.T).argmax(dim=1)
        logits = encoder.calibration.scale * embed(images) @ classes.to(images.device).T
        return logits.log_softmax(dim=1)[torch.arange(len(meant)), meant.to(images.device)]

    return score


def preference(folder: str, device: str) -> Reward:
    """Return the reward that `train_reward.py` has learned from preferred images; any range, differentiable.

    Raises:
        ValueError: if its dual encoder is not the one that it was trained on.
    """
    loaded = load_head(folder)
    encoder = load_alignment(loaded.encoder, device)
    if encoder.sha256 != loaded.encoder_sha256:
        raise ValueError(f"{folder} was trained on another {loaded.encoder}: train it anew")
    head, embed, known = loaded.head.requires_grad_(False), _image_rows(encoder), _Known(encoder.embed_texts)

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return head.to(images.device)(embed(images), known(prompts).to(images.device))

    return Reward(f"preference:{folder}", score, True, (loaded.sha256, encoder.sha256))


def load_alignment(name: str, device: str | None = None):
    """Return a dual encoder: that which we ship, or one in a folder or on the Hub."""
    return load_dual_encoder(str(default_model(name)) if name == ALIGNMENT_MODEL else name, device)


class _Known:
    """Embeds each text once."""

    def __init__(self, embed: Callable[[Sequence[str]], torch.Tensor]):
        self.embed, self.rows = embed, {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if new:
            self.rows.update(zip(new, self.embed(new)))
        return torch.stack([self.rows[text] for text in texts])


def _image_rows(encoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what embeds images in [-1, 1] as rows of length 1, with gradients."""
    processor, side = encoder.processor.image_processor, encoder.resolution
    encoder.model.requires_grad_(False)

    def embed(images: torch.Tensor) -> torch.Tensor:
        model = encoder.model.to(images.device)
        features = model.vision_model(pixel_values=_normalised(images, processor, (side, side))).pooler_output
        return F.normalize(model.visual_projection(features).float(), dim=1)

    return embed


def _normalised(images: torch.Tensor, processor, size: tuple[int, int]) -> torch.Tensor:
    """Return images in [-1, 1] as a processor would give them, with gradients."""
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    values = (images.clamp(-1, 1) + 1) / 2
    values = values.expand(-1, 3, -1, -1) if values.shape[1] == 1 else values
    mean, std = (torch.tensor(each).to(values)[:, None, None] for each in (processor.image_mean, processor.image_std))
    return (values - mean) / std


def classifier(folder: Path, name: str) -> Score:
    """Return the reward of an image classifier: the log-probability of the class whose name the prompt holds.

    Args:
        folder (`Path`): of any image classification model of Transformers, whose `id2label` names the classes.
        name (`str`): as it was asked for, for errors.

    Differentiable. Of several names in a prompt the longest counts; a prompt with none is an error.
    """
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    processor = AutoImageProcessor.from_pretrained(folder)
    model.eval().requires_grad_(False)
    labels = sorted(
        ((text.lower(), int(row)) for row, text in model.config.id2label.items()), key=lambda e: -len(e[0])
    )
    size = processor.size
    side = int(size.get("height") or size["shortest_edge"])

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        rows = [
            next((row for text, row in labels if re.search(rf"\b{re.escape(text)}\b", prompt.lower())), None)
            for prompt in prompts
        ]
        if None in rows:
            raise ValueError(f"the prompt {prompts[rows.index(None)]!r} names no class of {name}")
        logits = model.to(images.device)(_normalised(images, processor, (side, side))).logits
        return logits.log_softmax(dim=1)[torch.arange(len(rows)), torch.tensor(rows)]

    return score


BUILT_IN = {
    "brightness": Reward("brightness", brightness, differentiable=True),
    "jpeg_compressibility": Reward("jpeg_compressibility", jpeg_compressibility),
    "jpeg_incompressibility": Reward("jpeg_incompressibility", jpeg_incompressibility),
    "stain_hue": Reward("stain_hue", stain_hue, differentiable=True),
    "nucleus_area": Reward("nucleus_area", nucleus_area),
    "cell_count": Reward("cell_count", cell_count),
}
OF_MODELS = {"similarity": similarity, "zero_shot": zero_shot}
TERM = r"(?:([0-9.]+(?:e-?\d+)?)\s*\*\s*)?([A-Za-z_][^\s+*]*)"
NAMES = ", ".join(
    [*BUILT_IN, *(f"{name}[:MODEL]" for name in OF_MODELS), "classifier:MODEL", "preference:FOLDER", "module:function"]
)


def find_reward(spec: str, device: str = "cpu") -> Reward:
    """Return a reward, or a weighted sum or the minimum of some; what it gives is checked.

    Args:
        spec (`str`): see the top of this file; `brightness - 0.1 * jpeg_incompressibility` and
            `min(similarity, zero_shot)` are two.
        device (`str`): where a model behind it runs.

    Raises:
        ValueError: if there is no such reward.
        OSError: if its model cannot be loaded.
    """
    least = re.fullmatch(r"\s*min\((.*)\)\s*", spec)
    if least:
        parts = [find_reward(each, device) for each in least[1].split(",")]
        return _combined(spec, parts, lambda scores: torch.stack(scores).min(dim=0).values)
    if not re.fullmatch(rf"\s*[+-]?\s*{TERM}(\s*[+-]\s*{TERM})*\s*", spec):
        raise ValueError(f"no reward {spec!r}: give one of {NAMES}, a weighted sum of such, or min(A, B)")
    terms = re.findall(rf"([+-]?)\s*{TERM}", spec)
    if len(terms) == 1 and terms[0][:2] == ("", ""):
        return _checked(_one(spec.strip(), device))
    parts = [find_reward(name, device) for _, _, name in terms]
    weights = [float(f"{sign}{weight or 1}") for sign, weight, _ in terms]
    return _combined(spec, parts, lambda scores: sum(w * each for w, each in zip(weights, scores)))


@torch.no_grad()
def score_images(reward: Reward, images: np.ndarray, prompts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Return what images are worth, `(n,)`.

    Args:
        reward (`Reward`): from [`find_reward`], on the CPU.
        images (`np.ndarray`): uint8 `(n, height, width, channels)`.
        prompts (`Sequence[str]`): n texts.
        batch_size (`int`): images at once.

    Raises:
        ValueError: if the reward fails.
    """
    scores = []
    for start in range(0, len(images), batch_size):
        pixels = torch.as_tensor(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1
        scores.append(reward.score(pixels, prompts[start : start + batch_size]))
    return torch.cat(scores).double().numpy()


def _combined(spec: str, parts: list[Reward], combine) -> Reward:
    digests = tuple(each for part in parts for each in part.sha256)
    score = lambda images, prompts: combine([part.score(images, prompts) for part in parts])  # noqa: E731
    return Reward(spec, score, all(part.differentiable for part in parts), digests)


def _one(spec: str, device: str) -> Reward:
    name, _, rest = spec.partition(":")
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if name in OF_MODELS:
        encoder = load_alignment(rest or ALIGNMENT_MODEL, device)
        return Reward(spec, OF_MODELS[name](encoder), True, (encoder.sha256,))
    if name == "preference" and rest:
        return preference(rest, device)
    if name == "classifier" and rest:
        place = Path(rest).expanduser()
        folder = place if place.is_dir() else download_files(rest, ["*.json", "*.safetensors"], "classifier")
        try:
            with quiet_loading():
                return Reward(spec, classifier(folder, rest), True, (digest(*main_weights(folder)),))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"cannot use the classifier {rest} ({one_line(error)})") from error
    try:
        sys.path.insert(0, "")  # as in Python itself, modules of the working folder are found
        return Reward(spec, getattr(importlib.import_module(name), rest))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no reward {spec!r} ({one_line(error)}): give one of {NAMES}") from error
    finally:
        sys.path.remove("")


def _checked(reward: Reward) -> Reward:
    """Return the reward with a check of what it gives: as many finite numbers as images, or one line that says why."""

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        try:
            found = torch.as_tensor(reward.score(images, prompts))
        except Exception as error:  # of a user's own function: anything
            raise ValueError(f"the reward {reward.name} failed: {type(error).__name__}: {one_line(error)}") from error
        if found.shape != (len(images),):
            raise ValueError(f"the reward {reward.name} gave shape {tuple(found.shape)} for {len(images)} images")
        found = found.float()
        if not torch.isfinite(found).all():
            wrong = int((~torch.isfinite(found)).sum())
            raise ValueError(f"the reward {reward.name} gave {wrong} of {len(images)} values that are not finite")
        return found

    return reward._replace(score=score)
