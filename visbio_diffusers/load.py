"""Finding and loading a pipeline for the command line: the shipped checkpoint, a folder, or a Hub repo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoTokenizer

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.files import digest, one_line


DEFAULT_MODEL = "visbio-blood-28"
# HfHubHTTPError is one of them and one of its HTTP library, whose name depends on the version: no connection is that.
HUB_ERRORS = (OSError, *HfHubHTTPError.__bases__)
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
MIN_VOCABULARY = 100  # without its files a tokenizer loads silently, with its special tokens alone


def default_model(name: str = DEFAULT_MODEL) -> Path:
    """Return the folder of a checkpoint that comes in the package, or lies beside it in an editable install.

    Args:
        name (`str`): of the model; default is the pipeline.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    package = Path(__file__).parent
    for place in (package, package.parent):
        folder = place / "model_cards" / name
        if any((folder / file).is_file() for file in ("model_index.json", "config.json")):
            return folder
    raise FileNotFoundError(f"this installation lacks the model {name}: give --model a folder or a Hub id")


def load_pipeline(
    model: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    lora: str | None = None,
    lora_scale: float = 1.0,
) -> tuple[VisBioPipeline, dict[str, str]]:
    """Load a pipeline onto a device, and say what it is.

    Args:
        model (`str`, *optional*): a folder written by `save_pretrained`, or "owner/name" of a Hub repo; default is
            [`default_model`].
        device (`str`, *optional*): "cpu", "mps", "cuda" or "cuda:1"; default is the fastest there is.
        dtype (`str`): "float32", "float16" or "bfloat16".
        lora (`str`, *optional*): LoRA adapter to draw with: a folder, a .safetensors file, or a Hub id.
        lora_scale (`float`): its weight.

    Returns:
        The pipeline, and a dict with the name of the `model`, `model_sha256`, the hash of its UNet's weights file
        (or files, one after the other), and, if its training has recorded them, `caption_banks`, the names of those
        whose classes it has seen, and `reward_sha256`, the hashes of the models that it was tuned to please. An
        adapter adds `lora`, `lora_sha256`, `lora_scale`, and what its own training has recorded.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is incomplete or damaged, or there is no such device.
        OSError: if the Hub cannot be reached.
    """
    device = check_device(device)
    folder, name = find_model(model)
    try:
        _check_parts(folder)
        denoiser = "unet" if (folder / "unet").is_dir() else "transformer"  # of other pipelines of Diffusers
        weights = main_weights(folder / denoiser)
        if not weights:
            raise OSError(
                f"its {denoiser} has no .safetensors weights, and others, which can run code, are not loaded"
            )
        model_sha256 = digest(*weights)
        with quiet_loading():
            pipe = _load(folder, getattr(torch, dtype))
    except (OSError, TypeError, ValueError, SafetensorError) as error:  # TypeError: of a tokenizer without its file
        raise ValueError(f"cannot load the model {folder} ({one_line(error)}): get a whole copy of it") from error
    facts = {"model": name, "model_sha256": model_sha256, **recorded_facts(folder)}
    return pipe.to(device), facts | (_add_lora(pipe, lora, lora_scale, facts) if lora else {})


def _add_lora(pipe: VisBioPipeline, lora: str, scale: float, facts: dict[str, str]) -> dict[str, str]:
    """Load an adapter with its weight, and return what is to be said of it beside `facts` of the model."""
    place = Path(lora).expanduser()
    if place.is_file():
        folder, name, file = place.parent, place.name, place
    else:
        folder = place if place.is_dir() else download_files(lora, [LORA_WEIGHTS, "training.json"], "adapter")
        name = LORA_WEIGHTS
        file = folder / name
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(f"no adapter {lora}: give a folder with {LORA_WEIGHTS}, such a file, or a Hub id")
    try:
        pipe.load_lora_weights(str(folder), weight_name=name, adapter_name="lora")
    except (OSError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot use the adapter {lora} with {facts['model']} ({one_line(error)})") from error
    pipe.set_adapters("lora", scale)
    recorded = recorded_facts(file.parent)
    for key in set(recorded) & set(facts):
        recorded[key] = ", ".join(dict.fromkeys(f"{facts[key]}, {recorded[key]}".strip(", ").split(", ")))
    named = place.stem if place.is_file() else folder.resolve().name if place.is_dir() else lora
    return {"lora": named, "lora_sha256": digest(file), "lora_scale": f"{scale:g}", **recorded}


def download_files(name: str, patterns: list[str], kind: str) -> Path:
    """Return the folder with the files of a Hub repo that fit `patterns`, downloaded if need be.

    Raises:
        FileNotFoundError: if `name` is no Hub id; the message calls it a `kind`.
        OSError: if the Hub cannot be reached, or has no such repo.
    """
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise FileNotFoundError(f"no {kind} {name}: give its folder, or a Hub id owner/name")
    try:
        with quiet_loading():
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (ValueError, *HUB_ERRORS) as error:
        raise OSError(f"no {kind} {name} here, nor within reach on the Hub: {one_line(error)}") from error


def training_sets(model: str | None = None, lora: str | None = None) -> list[str]:
    """Return the names of the sets that a pipeline, and its adapter in a folder, were trained on, where recorded."""
    folders = [find_model(model)[0], *([Path(lora).expanduser()] if lora else [])]
    files = [folder / "training.json" for folder in folders]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return [name for record in records for name in record.get("config", {}).get("dataset_name", [])]


def find_model(model: str | None) -> tuple[Path, str]:
    """Return the folder of a model, downloaded if need be, and its name.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if the Hub cannot be reached, or has no such model.
    """
    if model is None:
        return default_model(), DEFAULT_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder, folder.resolve().name
    if folder.exists() or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise FileNotFoundError(f"no model folder {model}: give a saved pipeline, or a Hub id owner/name")
    try:
        with quiet_loading():
            folder = Path(VisBioPipeline.download(model))
            with suppress(EntryNotFoundError):  # which Diffusers does not download
                hf_hub_download(model, "training.json", revision=folder.name)
            return folder, model
    except (ValueError, *HUB_ERRORS) as error:
        raise OSError(
            f"no folder {model} here, and no such model within reach on the Hub: {one_line(error)}"
        ) from error


def _check_parts(folder: Path) -> None:
    """Refuse a folder without one of its parts, some of which would load as empty ones."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None and not (folder / name).is_dir():
            raise FileNotFoundError(f"it has no folder {name}")


def _load(folder: Path, dtype: torch.dtype) -> VisBioPipeline:
    """Load a pipeline whose parts are all of `dtype` (but for those that a UNet keeps in float32)."""
    if json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"] != "VisBioPipeline":
        options = {"local_files_only": True, "use_safetensors": True}
        return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
    pipe = VisBioPipeline.from_pretrained(folder, unet=None)  # passed here, Diffusers would print all its layers
    pipe.register_modules(unet=diffusers.AutoModel.from_pretrained(str(folder), subfolder="unet", torch_dtype=dtype))
    if len(pipe.tokenizer) <= len(pipe.tokenizer.all_special_tokens):  # what a lost vocabulary loads as
        raise ValueError("its tokenizer has no words")
    pipe.text_encoder.to(dtype)
    return pipe


def load_text_encoder(name: str):
    """Return a text encoder in float32 and its tokenizer, of a BERT or of a pipeline: a folder, or a Hub id.

    Raises:
        ValueError: if it has no vocabulary.
        OSError: if it is neither here nor on the Hub.
    """
    source = str(default_model()) if name == DEFAULT_MODEL else name
    parts = ("text_encoder", "tokenizer") if Path(source, "model_index.json").exists() else ("", "")
    text_encoder = AutoModel.from_pretrained(source, subfolder=parts[0], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder=parts[1])
    if len(tokenizer) < MIN_VOCABULARY:
        raise ValueError(f"{name} has no vocabulary: name a folder that holds the tokenizer's files too")
    return text_encoder, tokenizer


def main_weights(folder: Path) -> list[Path]:
    """Return the files of weights in a folder, without those of a variant (NAME.fp16.safetensors)."""
    return sorted(file for file in folder.glob("*.safetensors") if file.name.count(".") == 1)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the weights in a folder, as they are on disk."""
    with safe_open(main_weights(folder)[0], framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def recorded_facts(folder: Path) -> dict[str, str]:
    """Return the lists of its training.json that others must know, each as one text."""
    file = folder / "training.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: ", ".join(record[name]) for name in ("caption_banks", "reward_sha256") if name in record}


def check_device(device: str | None) -> str:
    """Return the device, or the fastest one.

    Raises:
        ValueError: if this machine lacks it; the message names those that it has.
    """
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.cuda.is_available():
        found += [*(f"cuda:{number}" for number in range(torch.cuda.device_count())), "cuda"]
    if device is not None and device not in found:
        raise ValueError(f"no device {device!r} on this machine: it has {', '.join(found)}")
    return device or found[-1]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Switch off the libraries' progress bars over the parts of a model, which take less than a second."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for library in (diffusers, transformers):
            library.utils.logging.enable_progress_bar()
