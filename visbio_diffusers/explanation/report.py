"""What a model drew of a prompt, and why, as one HTML file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.data import fit_image
from visbio_diffusers.explanation.attribution import HEADS, Attribution, attribute_image, attribute_words
from visbio_diffusers.explanation.ladder import denoising_ladder, ladder_sheet
from visbio_diffusers.explanation.seeds import pixel_differences, pixel_std, stack
from visbio_diffusers.files import whole_file
from visbio_diffusers.generate import open_studio
from visbio_diffusers.grid import contact_sheet, data_url, tint


TEMPLATE = "report.html.j2"
SHOWN = 8  # images, and words in a row
TILE = 112  # pixels
BATCH = 32


class Section(NamedTuple):
    """A part of the report: a title, sentences on what is seen, and a picture."""

    title: str
    text: str
    picture: Image.Image


def write_report(
    pipe: VisBioPipeline,
    provenance: dict[str, str],
    prompt: str,
    seeds: Sequence[int],
    path: str | Path,
    instead: str | None = None,
    **chosen: Any,
) -> None:
    """Draw a prompt, explain the images, and write that as one HTML file, whole or not at all.

    Args:
        pipe (`VisBioPipeline`), provenance (`dict[str, str]`): as `load_pipeline` returns them.
        prompt (`str`): what to draw.
        seeds (`Sequence[int]`): two or more, one for each image.
        path (`str` or `Path`): the HTML.
        instead (`str`, *optional*): another prompt to draw from the same seeds.
        chosen: arguments of the pipeline's call, see `open_studio`.

    Raises:
        ValueError: for a model of another kind or without cross-attention, or a prompt without a word.
        OSError: if the file cannot be written.
    """
    studio = _open(pipe, provenance, chosen)
    pipe.set_progress_bar_config(disable=False, desc="images")
    drawn = _draw(studio, prompt, seeds)
    sections = [_images(drawn, seeds), *_words(drawn, studio)]
    sections += [_ladder(studio, drawn[0].image, prompt, seeds[-1] + 1), _spread(drawn)]
    if instead is not None:
        pipe.set_progress_bar_config(disable=False, desc="other words")
        sections.append(_pairs(drawn, _draw(studio, instead, seeds), prompt, instead, seeds))
    record = {"synthetic": True, "prompt": prompt, "instead": instead, "seeds": list(seeds)}
    _write(path, studio, prompt, sections, record)


def write_image_report(
    pipe: VisBioPipeline,
    provenance: dict[str, str],
    prompt: str,
    image: Image.Image,
    name: str,
    seed: int,
    path: str | Path,
    **chosen: Any,
) -> None:
    """Explain a given image with a prompt, and write that as one HTML file, whole or not at all.

    Args:
        pipe, provenance, prompt, path, chosen: see [`write_report`].
        image (`PIL.Image.Image`): of any size, whose middle square is brought to the size of the model.
        name (`str`): of the image, for the report.
        seed (`int`): of the noise.

    Raises:
        ValueError, OSError: as [`write_report`].
    """
    studio = _open(pipe, provenance, chosen)
    image = Image.fromarray(fit_image(image, pipe.unet.config.sample_size, pipe.unet.config.in_channels).squeeze())
    found = attribute_image(studio.pipe, image, prompt, _heads(studio), seed=seed)
    text = "The image as it is given to the model, which has not drawn it."
    shown = Section("The image", text, contact_sheet([image], [name], 1, TILE, 2))
    sections = [shown, _own_words(found, studio, "the image"), _ladder(studio, image, prompt, seed)]
    _write(path, studio, prompt, sections, {"image": name, "prompt": prompt, "seed": seed})


def _open(pipe: VisBioPipeline, provenance: dict[str, str], chosen: dict[str, Any]):
    if not isinstance(pipe, VisBioPipeline):
        raise ValueError(f"a report needs a model that denoises pixels, a VisBioPipeline, not a {type(pipe).__name__}")
    return open_studio(pipe, provenance, **chosen)


def _heads(studio) -> tuple[tuple[int, int], ...] | None:
    return HEADS.get(studio.provenance["model"])


def _write(path: str | Path, studio, prompt: str, sections: list[Section], record: dict[str, Any]) -> None:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    text = environment.get_template(TEMPLATE).render(
        prompt=prompt,
        facts=studio.provenance,
        synthetic="synthetic" in record,
        sections=[(section, data_url(section.picture)) for section in sections],
        record=json.dumps(record | {"call": studio.call, **studio.provenance}, indent=1, ensure_ascii=False),
    )
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _draw(studio, prompt: str, seeds: Sequence[int]) -> list[Attribution]:
    found = []
    for start in range(0, len(seeds), BATCH):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
        prompts = [prompt] * len(generators)
        found += attribute_words(studio.pipe, prompts, _heads(studio), generator=generators, **studio.call)
    return found


def _images(drawn: list[Attribution], seeds: Sequence[int]) -> Section:
    captions = [f"seed {seed}" for seed in seeds]
    text = "Each image starts from other noise (its seed). All are drawn from the same words; none is a photograph."
    return Section("The images", text, contact_sheet([each.image for each in drawn], captions, SHOWN, TILE, 1))


def _words(drawn: list[Attribution], studio) -> list[Section]:
    mean = Image.fromarray(stack([each.image for each in drawn]).mean(axis=0).round().astype(np.uint8).squeeze())
    maps = np.mean([each.maps for each in drawn], axis=0)
    text = (
        "The mean of all images with the mean of all maps. What is red here too is so wherever the noise puts things: "
        "a habit of place, such as cells in the middle, rather than the answer to one cell."
    )
    sheet = word_sheet(drawn[0]._replace(image=mean, maps=maps))
    return [
        _own_words(drawn[0], studio, "the first image"),
        Section("Where each word is read on average", text, sheet),
    ]


def _own_words(found: Attribution, studio, which: str) -> Section:
    heads = "heads that find cells and nuclei in real images best" if _heads(studio) else "layers and heads"
    text = (
        "Red places asked this word more than the average place of the image did, blue ones less, while the image was "
        f"denoised (cross-attention, mean over the {heads}). Under each word stands its share of the "
        "attention to all words, and how far below and above it places are: where these numbers are small, so is the "
        "difference that the colours show. Words share the attention of a place, so where one is red another is blue. "
        "That a place asked a word does not prove that the word made it: compare images drawn from other words. The "
        "maps are coarse, and smooth only because they were enlarged."
    )
    if not _heads(studio):
        text += (
            " Of this model no heads are known that find what words name, and the mean of all may miss it: "
            "train_scripts/evaluate_attribution.py chooses some."
        )
    return Section(f"Where each word was read in {which}", text, word_sheet(found))


def word_sheet(found: Attribution) -> Image.Image:
    """Return a picture of an image and of where each word was read in it: red more, blue less than on average."""
    shares = found.maps.mean(axis=(1, 2), keepdims=True)
    contrast = found.maps / shares - 1
    largest = max(float(np.abs(contrast).max()), 1e-6)
    pictures, captions = [found.image], ["the image"]
    for word, share, change in zip(found.words, shares.flat, contrast, strict=True):
        pictures.append(tint(found.image, change / largest))
        captions.append(f"{word} {share:.0%} ({change.min():+.0%} to {change.max():+.0%})")
    return contact_sheet(pictures, captions, SHOWN, TILE, caption_lines=3)


def _ladder(studio, image: Image.Image, prompt: str, seed: int) -> Section:
    steps, scale = studio.call["num_inference_steps"], studio.call["guidance_scale"]
    rungs = denoising_ladder(studio.pipe, image, prompt, num_inference_steps=steps, guidance_scale=scale, seed=seed)
    text = (
        "The image above under more and more noise, not that of its seed (top), what the model takes it for at once "
        "(middle), and what it makes of it in all steps from there (bottom). Where the bottom still shows the "
        "image, the noise had left enough of it; further right the model draws a new one from the words. "
        "Numbers: root mean square difference from the image, in grey levels of 255."
    )
    return Section("From noise to image", text, ladder_sheet(image, rungs, TILE))


def _spread(drawn: list[Attribution]) -> Section:
    images = [each.image for each in drawn]
    std = pixel_std(images)
    mean = Image.fromarray(stack(images).mean(axis=0).round().astype(np.uint8).squeeze())
    text = (
        f"Left the mean of the {len(drawn)} images, right how much each pixel varies among them (standard deviation): "
        "white places are decided by the seed, black ones are the same in every image of these words."
    )
    captions = ["mean", f"black {std.min():.0f}, white {std.max():.0f} grey levels"]
    return Section("What the seed decides", text, contact_sheet([mean, _grey(std)], captions, 2, TILE, 2))


def _pairs(
    drawn: list[Attribution], others: list[Attribution], prompt: str, instead: str, seeds: Sequence[int]
) -> Section:
    images, changed = ([each.image for each in group] for group in (drawn, others))
    differences = pixel_differences(images, changed)
    between_words = np.sqrt(np.square(differences).mean())
    between_seeds = np.sqrt(2 * np.square(pixel_std(images)).mean())
    text = (
        f"Top: “{prompt}”. Middle: “{instead}”, from the same noise. Bottom: how far the two are apart, white most. "
        f"Pairs that differ in words alone are {between_words:.0f} grey levels apart (root mean square), pairs of the "
        f"first prompt that differ in the seed alone {between_seeds:.0f}: the closer the first number comes to the "
        "second, the more of the image hangs on the changed words. Last column: the mean over all seeds."
    )
    largest = differences.max()
    columns = min(SHOWN - 1, len(seeds))
    rows = []
    for row in (images, changed):
        mean = Image.fromarray(stack(row).mean(axis=0).round().astype(np.uint8).squeeze())
        rows += [*row[:columns], mean]
    rows += [_grey(each, largest) for each in [*differences[:columns], differences.mean(axis=0)]]
    captions = [*(f"seed {seed}" for seed in seeds[:columns]), "mean"] * 3
    return Section("What other words change", text, contact_sheet(rows, captions, columns + 1, TILE, 1))


def _grey(values: np.ndarray, largest: float | None = None) -> Image.Image:
    """Return a map (height, width) as a grey image: 0, or without `largest` its minimum, black; its maximum white."""
    low = values.min() if largest is None else 0.0
    scaled = (values - low) / max((largest or values.max()) - low, 1e-6)
    return Image.fromarray((255 * scaled).round().astype(np.uint8))
