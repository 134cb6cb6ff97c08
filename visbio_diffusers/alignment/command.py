"""`visbio describe` and `visbio search`: what they print, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.alignment.describe import Description, describe, read_candidates
from visbio_diffusers.alignment.diffusion_classifier import denoising_evidence
from visbio_diffusers.alignment.dual_encoder import DualEncoder, load_dual_encoder
from visbio_diffusers.alignment.explain import deciding_places, deciding_words, explanation_picture
from visbio_diffusers.alignment.search import index_corpus, index_images, nearest, search_texts
from visbio_diffusers.alignment.zero_shot import class_embeds
from visbio_diffusers.data import fit_image
from visbio_diffusers.data.photograph import find_images, read_photograph
from visbio_diffusers.files import one_line
from visbio_diffusers.grid import save_png
from visbio_diffusers.load import default_model, load_pipeline


DEFAULT_ENCODER = "visbio-align-blood"
BATCH = 64


def describe_files(
    places: list[Path],
    model: str | None = None,
    captions: str | None = None,
    subtypes: bool = False,
    top: int = 3,
    explain: Path | None = None,
    generator: str | None = None,
    device: str | None = None,
) -> Iterator[str]:
    """Yield what is said of each image; one that cannot be read is named, and the others go on.

    Args:
        places (`list[Path]`): image files and folders.
        model (`str`, *optional*): folder or Hub id of a dual encoder; default is the one that comes with the package.
        captions (`str`, *optional*): see [`read_candidates`]; default is the bank that the model was trained with.
        subtypes (`bool`): tell the subtypes of a bank apart.
        top (`int`): captions said of each image.
        explain (`Path`, *optional*): of one image, a PNG of what decided, with the generator's opinion in words.
        generator (`str`, *optional*): folder or Hub id of the pipeline that is asked for it.
        device (`str`, *optional*): see [`load_dual_encoder`].

    Raises:
        FileNotFoundError: for a path that is not there, or a folder without images.
        ValueError: if none of the images can be read, or models or captions are unfit.
    """
    files = find_images(places)
    if explain and len(files) != 1:
        raise ValueError(f"--explain is for one image, got {len(files)}: name one")
    encoder = load_dual_encoder(model or str(default_model(DEFAULT_ENCODER)), device)
    if not captions and not encoder.caption_bank:
        raise ValueError(f"the model {encoder.name} does not say which captions it knows: give --captions")
    candidates = read_candidates(captions or encoder.caption_bank, subtypes)
    asked = _load_generator(generator, device) if explain else None
    read = 0
    for start in range(0, len(files), BATCH):
        images, mistakes = _read_all(files[start : start + BATCH], encoder.resolution)
        yield from mistakes
        read += len(images)
        if not images:
            continue
        features = encoder.features(list(images.values()))
        said = describe(encoder, features, list(candidates.values()))
        for file, each in zip(images, said, strict=True):
            yield from _lines(str(file), each, list(candidates), top)
        if explain:
            embed = encoder.project(features)[0]
            yield from _explanation(encoder, images[files[0]], embed, said[0], candidates, explain, *asked)
    if not read:
        raise ValueError(f"no image could be read of {len(files)}: see above, and replace or remove them")


def _load_generator(generator: str | None, device: str | None) -> tuple[VisBioPipeline, str]:
    """Return the pipeline that gives the second opinion, and its name."""
    pipe, facts = load_pipeline(generator, device)
    if not isinstance(pipe, VisBioPipeline) or pipe.unet.config.in_channels != 3:
        raise ValueError(f"the generator {facts['model']} is no VisBioPipeline of colour images: name another")
    return pipe, facts["model"]


def _read_all(files: list[Path], resolution: int) -> tuple[dict[Path, np.ndarray], list[str]]:
    """Return the images that can be read, and a line for each that cannot."""
    images, mistakes = {}, []
    for file in files:
        try:
            images[file] = fit_image(read_photograph(file), resolution)
        except ValueError as error:
            mistakes.append(one_line(error))
    return images, mistakes


def _lines(file: str, said: Description, names: list[str], top: int) -> Iterator[str]:
    if said.doubt:
        yield f"{file}: none of these ({said.doubt}; nearest: {names[said.ranking[0][0]]})"
        return
    for rank, (number, probability) in enumerate(said.ranking[:top]):
        lead = f"{file}:" if rank == 0 else " " * (len(file) + 1)
        yield f"{lead} {probability:.3f}  {names[number]}"


def _explanation(
    encoder: DualEncoder,
    image: np.ndarray,
    embed: torch.Tensor,
    said: Description,
    candidates: dict[str, list[str]],
    output: Path,
    pipe: VisBioPipeline,
    generator: str,
) -> Iterator[str]:
    """Write the picture of what decided, and yield the words, the runner-up, and the generator's opinion."""
    names = list(candidates)
    if len(names) < 2:
        raise ValueError("--explain compares two captions, and there is one: give more")
    winner, other = (names[number] for number, _ in said.ranking[:2])
    means = class_embeds(encoder, [candidates[winner], candidates[other]])
    save_png(explanation_picture(image, deciding_places(encoder, image, *means), winner, other), output)
    yield f"runner-up: {other}"
    for title, name in (("for", winner), ("for the runner-up", other)):
        wordings = candidates[name]
        best = wordings[int((encoder.embed_texts(wordings) @ embed).argmax())]
        words = sorted(deciding_words(encoder, embed, best), key=lambda pair: -pair[1])[:4]
        yield f"words {title}: " + ", ".join(f"{word} {weight:+.3f}" for word, weight in words) + f"  (of: {best})"
    side = pipe.unet.config.sample_size
    pixels = torch.as_tensor(np.array(fit_image(image, side))).permute(2, 0, 1)[None].float() / 127.5 - 1
    evidence = denoising_evidence(pipe, pixels, names)[0]
    order = evidence.argsort()
    yield (
        f"second opinion, {generator} denoises it best as: {names[int(order[0])]}; next: {names[int(order[1])]} "
        f"({'the same' if names[int(order[0])] == winner else 'another'} answer)"
    )
    yield f"places: {output}"


def search_folder(
    query: str | Path,
    folder: Path,
    model: str | None = None,
    top: int = 5,
    index: Path | None = None,
    device: str | None = None,
) -> Iterator[str]:
    """Yield the images below a folder that are nearest to a text or an image, with their cosines.

    Args:
        query (`str` or `Path`): a text, or the path of an image.
        folder (`Path`): see [`index_images`].
        model, device: see [`describe_files`].
        top (`int`): results.
        index (`Path`, *optional*): file of the index.

    Raises:
        FileNotFoundError, ValueError, OSError: see [`index_images`] and [`read_photograph`].
    """
    encoder = load_dual_encoder(model or str(default_model(DEFAULT_ENCODER)), device)
    if isinstance(query, str) and not query.strip():
        raise ValueError("the query is empty: say what to look for")
    row = encoder.embed_texts([query]) if isinstance(query, str) else encoder.embed_images([read_photograph(query)])
    for entry, cosine in nearest(index_images(encoder, folder, index), row[0], top):
        yield f"{cosine:.3f}  {folder / entry['file']}"


def search_corpus(
    image: Path,
    corpus: Path,
    model: str | None = None,
    top: int = 5,
    index: Path | None = None,
    device: str | None = None,
) -> Iterator[str]:
    """Yield the abstracts of a file with the sentences nearest to an image: cosine, PMID, sentence.

    Args:
        image (`Path`): of the image.
        corpus (`Path`): see [`index_corpus`].
        model, top, index, device: see [`search_folder`].

    Raises:
        FileNotFoundError, ValueError, OSError: see [`index_corpus`] and [`read_photograph`].
    """
    encoder = load_dual_encoder(model or str(default_model(DEFAULT_ENCODER)), device)
    row = encoder.embed_images([read_photograph(image)])[0]
    for found in search_texts(index_corpus(encoder, corpus, index), row, top):
        yield f"{found.cosine:.3f}  {found.place}  {found.text}"
