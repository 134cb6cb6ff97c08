"""Drawing with provenance: prompts to PNGs and a grid, and balanced labelled sets that survive a kill.

Every image has a seed of its own and says in its metadata how it was made. It is drawn again, alone, by

    parameters = json.loads(Image.open(path).text["parameters"])
    generator = torch.Generator().manual_seed(parameters["seed"])
    pipe = VisBioPipeline.from_pretrained(model, dtype=getattr(torch, parameters["dtype"]))
    pipe(**parameters["call"], generator=generator).images[0]

which gives the same picture up to single grey levels, since sums over another batch size round differently.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from visbio_diffusers import VisBioPipeline, __version__
from visbio_diffusers.captions import CaptionBank
from visbio_diffusers.files import PREFIX, whole_file
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.pipelines.defaults import call_default


# The arguments of the pipeline that decide, with prompt and seed, what is drawn.
CALL = ("negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "guidance_interval")
CALL += ("guidance_rescale", "eta")
GRID_COLUMNS = 8
GRID_IMAGES = 256  # more would make a picture that nobody can open
GRID_PER_CLASS = 32


class Item(NamedTuple):
    """One image to draw; `path` is relative to its folder, `label` an int or, in multi-label sets, a list of 0/1."""

    prompt: str
    seed: int
    path: str
    label: int | list[int] | None = None
    class_name: str | None = None


class LabelledSet(NamedTuple):
    """A balanced set to draw: `prompts` is "plain" (each class' plainest prompt) or "captions" (training captions)."""

    bank: CaptionBank
    per_class: int
    seed: int = 0
    prompts: str = "plain"


class Studio(NamedTuple):
    """All that a drawing needs but prompt and seed: pipeline, arguments of its call, and facts about the model."""

    pipe: VisBioPipeline
    call: dict[str, Any]
    provenance: dict[str, str]
    batch_size: int = 64


def open_studio(pipe: VisBioPipeline, provenance: dict[str, str], batch_size: int = 64, **chosen: Any) -> Studio:
    """Return a studio that draws with the arguments `chosen`, and with the pipeline's own defaults where None.

    Args:
        pipe (`VisBioPipeline`): on its device.
        provenance (`dict[str, str]`): name and hash of the model, for the metadata of the images.
        batch_size (`int`): images drawn together.
        chosen: some of [`CALL`].
    """
    call = {name: call_default(pipe, name) if chosen.get(name) is None else chosen[name] for name in CALL}
    size = pipe.unet.config.sample_size
    call |= {"height": call["height"] or size, "width": call["width"] or size}
    facts = {**provenance, "scheduler": type(pipe.scheduler).__name__, "version": __version__}
    if pipe.config.get("timestep_spacing"):
        facts["timestep_spacing"] = pipe.config["timestep_spacing"]
    facts["dtype"] = str(pipe.unet.dtype).removeprefix("torch.")
    pipe.set_progress_bar_config(disable=True)  # `draw` shows one for all images
    return Studio(pipe, call, facts, batch_size)


def generate_prompts(studio: Studio, prompts: Sequence[str], num_images: int, seed: int, output: Path) -> Path:
    """Draw each prompt `num_images` times; image k of a prompt has the seed `seed` + k, whatever else is drawn.

    Writes the grid to `output` and the images to 00000.png, 00001.png, ... in a folder of that name without ".png",
    from which images of an earlier, larger run are removed.

    Returns:
        The folder.

    Raises:
        ValueError: for prompts, sizes and steps that the pipeline refuses.
        OSError: if the files cannot be written.
    """
    folder = output.with_suffix("")
    texts = [(prompt, seed + k) for prompt in prompts for k in range(num_images)]
    items = [Item(*text, f"{index:05d}.png") for index, text in enumerate(texts)]
    _check_writable(folder / items[0].path)
    shown: list[Image.Image] = []
    for item, image in draw(studio, _batches(items, studio.batch_size), len(items)):
        save_png(image, folder / item.path, png_record(studio, item))
        if len(shown) < GRID_IMAGES:
            shown.append(image)
    _save_grid(studio, items[: len(shown)], shown, output, columns=min(num_images, GRID_COLUMNS))
    _remove_earlier(folder, len(items))
    return folder


def generate_grid(studio: Studio, labelled: LabelledSet, output: Path) -> None:
    """Draw a labelled set as one picture, a class in each row; the images are those of [`generate_folder`].

    Raises:
        ValueError: if there are too many images for a picture.
        OSError: if the file cannot be written.
    """
    if labelled.per_class > GRID_PER_CLASS:
        raise ValueError(f"{labelled.per_class} images per class are too many for a grid: it takes {GRID_PER_CLASS}")
    items = plan(labelled)
    num_classes = len(items) // labelled.per_class
    items = [item for first in range(num_classes) for item in items[first::num_classes]]
    _check_writable(output)
    images = [image for _, image in draw(studio, _batches(items, studio.batch_size), len(items))]
    _save_grid(studio, items, images, output, columns=labelled.per_class)


def generate_folder(studio: Studio, labelled: LabelledSet, output: Path) -> None:
    """Draw a labelled set into an image folder that `datasets` loads, going on where a killed run stopped.

    `output`/train/<class>/00000.png, ..., with captions, labels and seeds in `output`/train/metadata.jsonl, which is
    written last; `output`/generation.json records the parameters. Classes take turns, so that the set is balanced at
    any moment. An interrupted and repeated run ends with the files of an uninterrupted one: whole images are kept,
    and a batch of which an image is missing or damaged is drawn again together, as it was the first time.

    Raises:
        ValueError: if the folder holds something else, or was begun with other parameters.
        OSError: if the files cannot be written.
    """
    items = plan(labelled)
    _begin(output, _parameters(studio, labelled, items))
    for part in output.glob(f"train/*/{PREFIX}*"):
        part.unlink()  # of a killed run
    missing = {item.path for item in items if not _is_whole(output / item.path)}
    batches = [b for b in _batches(items, studio.batch_size) if any(item.path in missing for item in b)]
    for item, image in draw(studio, batches, len(items)):
        if item.path in missing:
            save_png(image, output / item.path, png_record(studio, item))
    rows = [json.dumps(_row(item), ensure_ascii=False) + "\n" for item in items]
    with whole_file(output / "train" / "metadata.jsonl") as temporary:
        temporary.write_text("".join(rows), encoding="utf-8")


def generate_npz(studio: Studio, labelled: LabelledSet, output: Path) -> None:
    """Draw a labelled set as [`generate_folder`] does, and pack it into an npz in MedMNIST's format.

    `train_images` is uint8 of shape `(n, height, width, 3)`, or `(n, height, width)` if grey; `train_labels` uint8
    `(n, 1)`, or `(n, classes)` in multi-label sets; `provenance` is a text, the parameters as JSON, which with
    prompts and seeds stand beside it in a .json, too. Until
    it is complete, the images lie in a folder of its name with ".part".

    Raises:
        ValueError: if the file exists and was made otherwise.
        OSError: if the files cannot be written.
    """
    sidecar, folder = output.with_suffix(".json"), output.with_name(f"{output.name}.part")
    items = plan(labelled)
    parameters = _parameters(studio, labelled, items)
    if output.exists():
        if not sidecar.exists():
            raise ValueError(f"{output} exists without {sidecar.name}, which says how it was made: move it away")
        _compare(sidecar, parameters)
    else:
        generate_folder(studio, labelled, folder)
        images = np.stack([_read(folder / item.path) for item in items])
        labels = np.array([item.label for item in items], dtype=np.uint8).reshape(len(items), -1)
        content = {**parameters, "images": [_row(item) for item in items]}
        with whole_file(sidecar) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        with whole_file(output) as temporary:
            provenance = np.array(json.dumps(parameters, ensure_ascii=False))
            np.savez_compressed(temporary, train_images=images, train_labels=labels, provenance=provenance)
    if folder.exists():  # also after a run that was killed just before this line
        shutil.rmtree(folder)


def plan(labelled: LabelledSet) -> list[Item]:
    """Return the images of a balanced set, classes in turn; of a multi-label set, each finding alone, and none.

    Image i has the seed `labelled.seed` + i, which also draws its caption.
    """
    bank = labelled.bank
    labels: list[Any] = list(range(len(bank.classes)))
    names = list(bank.class_names)
    if bank.no_finding is not None:
        labels = [*np.eye(len(labels), dtype=int).tolist(), [0] * len(labels)]
        names.append(bank.no_finding.name)
    items = []
    for index in range(labelled.per_class * len(labels)):
        number, place = divmod(index, len(labels))
        seed, label, name = labelled.seed + index, labels[place], names[place]
        prompt = bank.plain_caption(label)
        if labelled.prompts == "captions":
            prompt = bank.caption(label, np.random.default_rng(seed))
        folder = re.sub(r"[^\w-]+", "_", name).strip("_")
        items.append(Item(prompt, seed, f"train/{folder}/{number:05d}.png", label, name))
    return items


def draw(studio: Studio, batches: Sequence[Sequence[Item]], total: int) -> Iterator[tuple[Item, Image.Image]]:
    """Draw batch after batch, each image from its own seed, under one progress bar.

    Args:
        batches (`Sequence[Sequence[Item]]`): what is still to be drawn.
        total (`int`): images of the whole task, for the bar.

    Raises:
        ValueError: for what the pipeline refuses.
        MemoryError: if a batch does not fit on the GPU.
    """
    pending = sum(map(len, batches))
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"
    with tqdm(total=total, initial=total - pending, desc="images", bar_format=form) as bar:

        def advance(pipe, step, timestep, tensors):
            bar.update(min(len(batch) / pipe.num_timesteps, total - bar.n))  # never beyond, by rounding
            return {}

        watch = {"callback_on_step_end": advance, "callback_on_step_end_tensor_inputs": []}
        for batch in batches:
            generators = [torch.Generator().manual_seed(item.seed) for item in batch]
            prompts = [item.prompt for item in batch]
            try:
                drawn = studio.pipe(prompts, **studio.call, generator=generators, **watch)
            except torch.OutOfMemoryError as error:
                raise MemoryError(f"a batch of {len(batch)} images does not fit: use a smaller batch size") from error
            yield from zip(batch, drawn.images, strict=True)


def _batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def png_record(studio: Studio, item: Item) -> dict[str, str]:
    """Return the text chunks of the PNG of an image: what drew it, and how to draw it again."""
    facts = studio.provenance
    parameters = {"synthetic": True, "seed": item.seed, "call": {"prompt": item.prompt, **studio.call}, **facts}
    if item.label is not None:
        parameters |= {"label": item.label, "class_name": item.class_name}
    return {
        "Description": f"Synthetic image drawn by the model {facts['model']}: {item.prompt}",
        "Software": f"visbio_diffusers {__version__}",
        "synthetic": "true",
        "prompt": item.prompt,
        "negative_prompt": studio.call["negative_prompt"] or "",
        "seed": str(item.seed),
        "num_inference_steps": str(studio.call["num_inference_steps"]),
        "guidance_scale": str(studio.call["guidance_scale"]),
        **facts,
        "parameters": json.dumps(parameters, ensure_ascii=False),
    }


def _save_grid(
    studio: Studio, items: Sequence[Item], images: Sequence[Image.Image], output: Path, columns: int
) -> None:
    facts = studio.provenance
    drawn = [{"prompt": item.prompt, "seed": item.seed} for item in items]
    parameters = {"synthetic": True, "images": drawn, "call": studio.call, **facts}
    metadata = {
        "Description": f"Synthetic images drawn by the model {facts['model']}",
        "Software": f"visbio_diffusers {__version__}",
        "synthetic": "true",
        **facts,
        "parameters": json.dumps(parameters, ensure_ascii=False),
    }
    save_png(contact_sheet(images, [item.prompt for item in items], columns), output, metadata)


def _row(item: Item) -> dict[str, Any]:
    """Return what metadata.jsonl says of an image."""
    name = item.path.removeprefix("train/")
    row = {"file_name": name, "text": item.prompt, "label": item.label, "class_name": item.class_name}
    return {**row, "prompt": item.prompt, "seed": item.seed, "synthetic": True}


def _parameters(studio: Studio, labelled: LabelledSet, items: Sequence[Item]) -> dict[str, Any]:
    """Return what must be equal for a run to go on with the images of another; JSON, so lists in place of tuples."""
    bank = labelled.bank
    parameters = {"synthetic": True, "dataset": bank.name, **labelled._asdict(), "class_names": bank.class_names}
    parameters |= {"call": studio.call, **studio.provenance}
    parameters["rows_sha256"] = hashlib.sha256(repr(list(map(_row, items))).encode()).hexdigest()  # a bank may change
    del parameters["bank"]
    return json.loads(json.dumps(parameters))


def _begin(folder: Path, parameters: dict[str, Any]) -> None:
    """Record the parameters in a new folder, or check that one begun before has the same."""
    record = folder / "generation.json"
    if record.exists():
        _compare(record, parameters)
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and has no {record.name} that says what is in it: use a new folder")
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(parameters, indent=2, ensure_ascii=False), encoding="utf-8")


def _compare(record: Path, parameters: dict[str, Any]) -> None:
    found = json.loads(record.read_text(encoding="utf-8"))
    found, wanted = ({**content, **content["call"], "call": None} for content in (found, parameters))
    for key in (key for key in wanted if found.get(key) != wanted[key]):
        raise ValueError(
            f"{record} says {key}={found.get(key)!r}, not {wanted[key]!r}: repeat that command, or write elsewhere"
        )


def _check_writable(path: Path) -> None:
    """Refuse a target before the work rather than after it."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise PermissionError(f"cannot write {path}: {place} is no folder that you may write to")


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except (OSError, SyntaxError):  # absent, cut short, damaged
        return False
    return True


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _remove_earlier(folder: Path, num_images: int) -> None:
    """Remove the images of an earlier, larger run, and nothing that this package did not write."""
    for path in folder.glob("*.png"):
        if re.fullmatch(r"\d{5,}", path.stem) and int(path.stem) >= num_images:
            with Image.open(path) as image:
                ours = image.info.get("Software", "").startswith("visbio_diffusers ")
            if ours:
                path.unlink()
