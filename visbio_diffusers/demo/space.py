"""The page as a Hugging Face Space: a folder to upload, which holds all that the page needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

import visbio_diffusers
from visbio_diffusers.alignment.command import DEFAULT_ENCODER
from visbio_diffusers.cards import base_of, is_adapter
from visbio_diffusers.files import PREFIX
from visbio_diffusers.load import DEFAULT_MODEL, default_model


APP = '''"""A page to try {name} on. A Space says by GRADIO_SERVER_NAME where to listen."""

import os

from visbio_diffusers.demo.models import Models
from visbio_diffusers.demo.server import serve


models = Models({model!r}, {adapters!r})
host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
serve(models, None, host, port, print)
'''
README = """---
title: {name}
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
pinned: false
---

A page to try {name} on: describe a biological image, and the model draws it. All drawn images are synthetic; not for
clinical use. Written by `visbio demo --write-space` of visbio_diffusers {version}, whose source is in this repository.
"""


def write_space(folder: Path, model: str | None = None, adapters: Sequence[str] = ()) -> None:
    """Write a Space: app.py, requirements.txt, README.md, this package, and models that lie on this machine.

    Args:
        folder (`Path`): a new one; it is whole, or not there.
        model (`str`, *optional*): a folder, which is copied, or a Hub id; default is the model that comes with the
            package, with the adapters beside it.
        adapters (`Sequence[str]`): folders, which are copied, .safetensors files, or Hub ids.

    Raises:
        FileExistsError: if there is such a folder.
        ValueError: if Gradio is not installed.
        OSError: if the folder cannot be written.
    """
    try:
        gradio = version("gradio")
    except ImportError as error:
        raise ValueError('a Space needs to know its Gradio: pip install "visbio_diffusers[demo]"') from error
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=PREFIX) as temporary:
        space = Path(temporary, "space")
        package = space / visbio_diffusers.__name__
        ignored = shutil.ignore_patterns("__pycache__", "model_cards")
        shutil.copytree(Path(visbio_diffusers.__file__).parent, package, ignore=ignored)
        if model is None:
            for place in default_model().parent.iterdir():
                ours = is_adapter(place) and base_of(place) is None
                if ours or place.name in (DEFAULT_MODEL, DEFAULT_ENCODER):
                    shutil.copytree(place, package / "model_cards" / place.name)
        else:
            shutil.copytree(default_model(DEFAULT_ENCODER), package / "model_cards" / DEFAULT_ENCODER)
            model = _carried(model, space, "model")
        given = [_carried(each, space, f"adapters/{number}") for number, each in enumerate(adapters, 1)]
        name = DEFAULT_MODEL if model is None else Path(model).name
        files = {
            "app.py": APP.format(name=name, model=model, adapters=given),
            "README.md": README.format(name=name, gradio=gradio, version=visbio_diffusers.__version__),
            "requirements.txt": "\n".join([*_dependencies(), f"gradio=={gradio}"]) + "\n",
        }
        for file, text in files.items():
            (space / file).write_text(text, encoding="utf-8")
        os.replace(space, folder)


def _carried(name: str, space: Path, place: str) -> str:
    """Copy a model that lies on this machine into the Space, and return what it is called there."""
    source = Path(name).expanduser()
    if not source.exists():
        return name
    place = f"{place}/{source.resolve().name}"
    if source.is_dir():
        shutil.copytree(source, space / place)
    else:
        (space / place).parent.mkdir(parents=True)
        shutil.copy2(source, space / place)
    return place


def _dependencies() -> list[str]:
    return [line for line in requires(visbio_diffusers.__name__) or [] if "extra ==" not in line]
