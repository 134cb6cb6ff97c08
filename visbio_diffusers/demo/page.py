"""The layout of the page, in Gradio."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from PIL import Image

from visbio_diffusers import __version__
from visbio_diffusers.demo.draw import draw_images
from visbio_diffusers.demo.look import describe_upload, edit_upload, reconstruct_upload
from visbio_diffusers.demo.models import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SCALE,
    MAX_SEED,
    MAX_STEPS,
    NO_ADAPTER,
    OWN_SCHEDULER,
    SCHEDULERS,
    Models,
)
from visbio_diffusers.demo.votes import MAX_NAME, PAIRS, draw_pair, vote
from visbio_diffusers.files import one_line
from visbio_diffusers.grid import save_png


KEPT_SECONDS = 3600  # for which images lie ready to be saved
SUFFIXES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"]
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
.pixels img {image-rendering: pixelated; object-fit: contain}
.pixels .grid-wrap {height: auto !important; max-height: none !important; min-height: 0}
.pixels .thumbnail-item {aspect-ratio: auto; height: auto}
.pair {max-width: 620px; margin: auto}
.facts, .facts p, .facts code {font-size: 0.82rem; overflow-wrap: anywhere}
"""
MAPS = (
    "**Where each word was read**, a row for each image: red places asked the word more than the average place did, "
    "blue ones less. Where a word was read need not be what it did."
)
NEIGHBOURS = (
    "**The nearest real images** of {name}, by pixels, below the drawn ones; how far apart they are is the root mean "
    "square difference in grey levels, of 255."
)
EDITED = (
    "From left to right: **the image** as the model sees it; **drawn again** from the noise found behind it, which "
    "tells how far to trust the edit; and **the edit**."
)
NOTICE = "**All drawn images are synthetic. For research and teaching; not for clinical use.**"


def build_page(models: Models, votes: Path | None, folder: Path):
    """Return the page as `gradio.Blocks`.

    Args:
        models (`Models`), votes (`Path`, *optional*): see `serve`.
        folder (`Path`): temporary, for images that are shown.

    Raises:
        ValueError: if Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError('the page needs Gradio: pip install "visbio_diffusers[demo]"') from error
    shelf = _Shelf(folder)
    name, sha256 = models.facts["model"], models.facts["model_sha256"]
    with gr.Blocks(title=f"VisBioFusion: {name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.Markdown(f"# VisBioFusion\nDescribe a biological image, and `{name}` draws it.\n\n{NOTICE}")
        with gr.Tab("Draw"):
            _draw_tab(gr, models, shelf)
        with gr.Tab("Describe"):
            _describe_tab(gr, models)
        with gr.Tab("Draw again and edit"):
            _redraw_tab(gr, models, shelf)
        if votes is not None:
            with gr.Tab("Which is better?"):
                _votes_tab(gr, models, shelf, votes)
        text = f"Model `{name}`, sha256 `{sha256}`; visbio_diffusers {__version__}"
        gr.Markdown(text, elem_classes="facts")
    return page


def _draw_tab(gr, models: Models, shelf: _Shelf) -> None:
    gr.Markdown("Each image starts from the noise of its own seed; the same seed and words draw the same image.")
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(models.examples[0], label="Prompt", scale=5)
        button = gr.Button("Draw", variant="primary", min_width=120)
    _examples(gr, models, prompt)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, maximum=MAX_SEED)
            steps, guidance = _step_sliders(gr, models)
            scheduler = gr.Dropdown(list(SCHEDULERS), value=OWN_SCHEDULER, label="Scheduler")
            with gr.Row():
                adapter = gr.Dropdown(models.adapters, value=NO_ADAPTER, label="LoRA adapter")
                scale = gr.Slider(0, MAX_SCALE, 1, step=0.05, label="LoRA scale")
            maps = gr.Checkbox(False, label="Show where each word was read")
            near = gr.Checkbox(False, label="Show the nearest real images", visible=models.reference is not None)
        with gr.Column(scale=3, min_width=360):
            images = _gallery(gr, 4)
            facts = gr.Markdown(elem_classes="facts")
            sheet, real = _picture(gr), _picture(gr)

    @_answering(gr)
    def draw(*values):
        drawing = draw_images(models, *values)
        _warn(gr, drawing.warnings)
        captions = [f"seed {record['seed']}" for record in drawing.records]
        said = [_facts(drawing.records[0])]
        if drawing.word_maps:
            said.append(MAPS)
        if drawing.neighbours:
            said.append(NEIGHBOURS.format(name=models.reference.name))
        return (
            shelf.put(drawing.images, drawing.records, captions),
            "\n\n".join(said),
            gr.update(value=drawing.word_maps, visible=drawing.word_maps is not None),
            gr.update(value=drawing.neighbours, visible=drawing.neighbours is not None),
        )

    inputs = [prompt, count, seed, steps, guidance, scheduler, adapter, scale, maps, near]
    _on_click(button, draw, inputs, [images, facts, sheet, real], "draw")


def _describe_tab(gr, models: Models) -> None:
    gr.Markdown("Upload an image of a single cell. The middle square is looked at; the answer may be *none of these*.")
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            file = _upload(gr)
            button = gr.Button("Describe", variant="primary")
            gr.Markdown("What the model sees:")
            seen = gr.Image(show_label=False, format="png", height=240, elem_classes="pixels", buttons=[])
        with gr.Column(scale=3, min_width=360):
            verdict = gr.Markdown()
            label = gr.Label(show_label=False, num_top_classes=5, show_heading=False)

    @_answering(gr)
    def describe(path):
        said = describe_upload(models, path)
        best, probability = next(iter(said.probabilities.items()))
        text = f"### {best}\n{probability:.0%}, says `{models.encoder.name}`, among the captions that it knows."
        if said.doubt:
            text = f"### none of these\n{said.doubt}; the nearest would be {best}."
        return said.seen, text, {} if said.doubt else said.probabilities

    _on_click(button, describe, [file], [seen, verdict, label], "describe")


def _redraw_tab(gr, models: Models, shelf: _Shelf) -> None:
    gr.Markdown("Start from an image of your own: draw it again from a noised copy, or change what it shows by text.")
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            file = _upload(gr)
            steps, guidance = _step_sliders(gr, models)
            with gr.Group():
                gr.Markdown("**Draw again**: a strength of 0 keeps the image, 1 ignores it.", padding=True)
                strength = gr.Slider(0, 1, 0.4, step=0.05, label="Strength")
                prompt = gr.Textbox(label="Prompt (may be empty)")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                again = gr.Button("Draw again", variant="primary")
            with gr.Group():
                gr.Markdown("**Edit**: the noise behind the image is drawn with another text.", padding=True)
                source = gr.Textbox(models.examples[0], label="It shows")
                target = gr.Textbox(models.examples[-1], label="It is to show")
                change = gr.Button("Edit", variant="primary")
        with gr.Column(scale=3, min_width=360):
            images = _gallery(gr, 2)
            facts = gr.Markdown(elem_classes="facts")

    @_answering(gr)
    def reconstruct(*values):
        done = reconstruct_upload(models, *values)
        _warn(gr, done.warnings)
        captions = ["what the model sees", "drawn again"]
        files = shelf.put([done.given, done.drawn], [{}, done.record], captions)
        return gr.update(value=files, columns=2), _facts(done.record)

    @_answering(gr)
    def edit(*values):
        done = edit_upload(models, *values)
        _warn(gr, done.warnings)
        files = shelf.put([done.drawn], [done.record], [""])
        return gr.update(value=files, columns=1), f"{EDITED}\n\n{_facts(done.record)}"

    settings, outputs = [steps, guidance], [images, facts]
    _on_click(again, reconstruct, [file, strength, prompt, seed, *settings], outputs, "reconstruct")
    _on_click(change, edit, [file, source, target, *settings], outputs, "edit")


def _votes_tab(gr, models: Models, shelf: _Shelf, votes: Path) -> None:
    gr.Markdown(
        "Two images of one text, from seeds at random: which fits the text better? Votes are kept, with the nickname "
        f"if you give one, in `{votes / PAIRS}`, from which `train_reward.py` and `train_dpo_lora.py` learn."
    )
    pair = gr.State(None, time_to_live=KEPT_SECONDS)
    with gr.Row():
        prompt = gr.Textbox(models.examples[0], label="Prompt", scale=3)
        who = gr.Textbox(label="Nickname (may be empty)", max_length=MAX_NAME, scale=1)
    _examples(gr, models, prompt)
    button = gr.Button("Draw a pair", variant="primary")
    images = _gallery(gr, 2, "pair")
    with gr.Row():
        texts = {"left": "Left is better", "skip": "Skip", "right": "Right is better"}
        buttons = {choice: gr.Button(text) for choice, text in texts.items()}
    told = gr.Markdown()

    @_answering(gr)
    def draw(text):
        drawn = draw_pair(models, text)
        return drawn, shelf.put(drawn.images, drawn.records, ["left", "right"])

    def voting(choice):
        @_answering(gr)
        def answer(current, name):
            kept = vote(votes, current, choice, name)
            return None, [], "Thank you: your vote is kept." if kept else "Skipped: nothing is kept."

        return answer

    _on_click(button, draw, [prompt], [pair, images], "draw_pair")
    for choice, each in buttons.items():
        event = _on_click(each, voting(choice), [pair, who], [pair, images, told], f"vote_{choice}")
        event.success(draw, prompt, [pair, images], concurrency_id="model", api_visibility="private")


def _on_click(button, function, inputs, outputs, name: str):
    """Have a button call a function, one at a time of all that use the models."""
    return button.click(function, inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="model")


def _answering(gr) -> Callable:
    """Have a function answer mistakes by their message in the page."""

    def decorate(function):
        @wraps(function)
        def answer(*values):
            try:
                return function(*values)
            except (ValueError, OSError, MemoryError) as error:
                raise gr.Error(one_line(error), print_exception=False) from error

        return answer

    return decorate


def _warn(gr, warnings: list[str]) -> None:
    for text in warnings:
        gr.Warning(text)


def _examples(gr, models: Models, prompt) -> None:
    gr.Examples([[text] for text in models.examples], prompt, label="Examples", examples_per_page=16)


def _step_sliders(gr, models: Models):
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, models.defaults["num_inference_steps"], step=1, label="Steps")
        label = "Guidance (1 is off)"
        guidance = gr.Slider(1, MAX_GUIDANCE, models.defaults["guidance_scale"], step=0.05, label=label)
    return steps, guidance


def _upload(gr):
    file = gr.File(label="Image: PNG, JPEG, TIFF, ...", file_types=SUFFIXES, height=140, elem_classes="upload")
    keep = file.async_move_resource_to_block_cache

    async def keep_files(place):  # Gradio would fetch an address that a visitor sends in the place of a file
        if "://" in str(place):
            raise gr.Error("upload the image itself, not an address", print_exception=False)
        return await keep(place)

    file.async_move_resource_to_block_cache = keep_files
    return file


def _gallery(gr, columns: int, *classes: str):
    return gr.Gallery(
        show_label=False, columns=columns, height="auto", format="png", object_fit="contain", preview=False,
        interactive=False, elem_classes=["pixels", *classes], buttons=["download", "download_all", "fullscreen"],
    )  # fmt: skip


def _picture(gr):
    return gr.Image(show_label=False, visible=False, format="png", buttons=["download", "fullscreen"])


def _facts(record: dict[str, str]) -> str:
    """Return what a PNG says of its making, but for its text, as one line."""
    names = ("model", "model_sha256", "lora", "lora_sha256", "lora_scale", "scheduler", "num_inference_steps")
    names += ("timestep_spacing", "guidance_scale", "strength", "image_sha256", "dtype", "version")
    return "Each PNG says: synthetic; " + "; ".join(f"{name} `{record[name]}`" for name in names if name in record)


class _Shelf:
    """PNG files that are shown, in a temporary folder, of which the oldest make room."""

    def __init__(self, folder: Path, limit: int = 64):
        self.folder, self.limit = folder, limit
        self.shown: list[Path] = []

    def put(self, images: list[Image.Image], records: list[dict[str, str]], captions: list[str]) -> list:
        """Write images with their text chunks; return what a gallery shows."""
        place = Path(tempfile.mkdtemp(dir=self.folder, prefix="shown-"))
        self.shown.append(place)
        for old in self.shown[: -self.limit]:
            shutil.rmtree(old, ignore_errors=True)
        del self.shown[: -self.limit]
        files = []
        for number, (image, record, caption) in enumerate(zip(images, records, captions)):
            name = f"seed-{record['seed']}" if "seed" in record else f"image-{number}"
            files.append((place / f"visbio-{name}.png", caption))
            save_png(image, files[-1][0], record)
        return files
