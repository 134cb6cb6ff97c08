"""Hub repos: a trained folder made complete, tried in fresh processes, and uploaded.

A pipeline's repo also carries its classes as source (`pipeline.py`, `unet/visbio_diffusers.py`), which Diffusers runs
only for those who have not installed this package and pass `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from visbio_diffusers.bundle import bundle
from visbio_diffusers.captions import BANK_FOLDER, load_bank
from visbio_diffusers.cards import ABOUT, CARD, TRAINING, base_of, has_index, is_adapter, is_dual_encoder, render_card
from visbio_diffusers.checkpoints import MANIFEST
from visbio_diffusers.files import one_line, whole_file
from visbio_diffusers.generate import LabelledSet, generate_grid, generate_prompts, open_studio
from visbio_diffusers.load import HUB_ERRORS, find_model, load_pipeline, stored_dtype


logger = logging.getLogger(__name__)

GRID = "grid.png"
CODE = {
    "pipeline.py": ("visbio_diffusers.pipelines.pipeline_visbio", "VisBioPipeline"),
    "unet/visbio_diffusers.py": ("visbio_diffusers.models.unet_visbio", "VisBioUNet"),
}
TRY_PIPELINE = """
import hashlib, sys
folder, mode, *variant = sys.argv[1:]
sys.modules |= {} if mode == "package" else {"visbio_diffusers": None}  # None: as if it was not installed
if mode == "package":
    import visbio_diffusers
import torch
from diffusers import DiffusionPipeline

code = {} if mode == "package" else {"custom_pipeline": folder, "trust_remote_code": True}
pipe = DiffusionPipeline.from_pretrained(folder, **code, **({"variant": variant[0]} if variant else {}))
pipe.set_progress_bar_config(disable=True)
drawn = pipe("a cell", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
print(hashlib.sha256(drawn.tobytes()).hexdigest())
"""
TRY_ADAPTER = """
import sys
from visbio_diffusers.load import load_pipeline

pipe, _ = load_pipeline(sys.argv[2], "cpu", lora=sys.argv[1])
pipe("a cell", num_inference_steps=2)
"""
TRY_DUAL_ENCODER = """
import sys
from visbio_diffusers.alignment import load_dual_encoder

load_dual_encoder(sys.argv[1], "cpu").embed_texts(["a cell"])
"""
TRY_ENCODER = """
import sys
from transformers import AutoModel, AutoTokenizer

encoder, tokenizer = (each.from_pretrained(sys.argv[1]) for each in (AutoModel, AutoTokenizer))
encoder(**tokenizer("a cell", return_tensors="pt"))
"""


def open_repo(repo_id: str, private: bool = False, pull_request: bool = False) -> str:
    """Return the full name of a model repo to which this user may write; create it if there is none.

    Args:
        repo_id (`str`): "owner/name", or a name in the user's own space.
        private (`bool`): whether a new repo is private.
        pull_request (`bool`): only ask for the right to open one, in a repo that is there.

    Raises:
        ValueError: if nobody is logged in, the token may not write there, or the name is none.
        OSError: if the Hub cannot be reached.
    """
    api = HfApi()
    try:
        user = api.whoami()["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        if not pull_request:
            api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the owner has set it
        api.auth_check(repo_id, write=not pull_request)
        public = not api.model_info(repo_id).private
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "the Hub asks who you are: run `hf auth login`, or set HF_TOKEN to a token of yours"
        ) from error
    except HUB_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(
                f"this token may not write to {repo_id} on the Hub ({one_line(error)}): use a token with the right to "
                "write, and a repo of your own"
            ) from error
        raise _unreachable(error) from error
    if private and public:
        raise ValueError(f"{repo_id} is there and public: make it private on the Hub, or leave out private")
    return repo_id


def complete(folder: Path, repo: str | None = None) -> None:
    """Write to a trained folder what its repo has beside weights: the card, and the code of a pipeline.

    Args:
        folder (`Path`): a pipeline, a LoRA adapter or a text encoder, with its training.json or about.md.
        repo (`str`, *optional*): its Hub id for the card, or only a title; that of the folder by default.
    """
    for path, text in code_of(folder).items():
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(render_card(folder, repo), encoding="utf-8")


def code_of(folder: Path) -> dict[Path, str]:
    """Return the sources that belong into the folder of a pipeline; none for other folders and other classes."""
    if not has_index(folder):
        return {}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    classes = {index["_class_name"], *(value[1] for value in index.values() if isinstance(value, list))}
    return {folder / file: bundle(name, module, [name]) for file, (module, name) in CODE.items() if name in classes}


def check_source(source: Path) -> None:
    """Raise a FileNotFoundError with the way out for a folder that no training has written."""
    if not any((source / file).is_file() for file in (TRAINING, ABOUT)):
        raise FileNotFoundError(
            f"no training.json in {source}: give what a training has written, such as RUN/pipeline"
        )


def write_repo(
    source: Path, folder: Path, repo: str, variant: str | None = None, max_shard_size: str | None = None
) -> None:
    """Write to a new folder all that a repo holds: weights, card, a grid of images, code.

    Args:
        source (`Path`): a trained pipeline, adapter or text encoder.
        repo (`str`): its Hub id, or a title, for the card.
        variant (`str`, *optional*): "fp16" adds weights in half precision, for `from_pretrained(variant="fp16")`.
        max_shard_size (`str`, *optional*): such as "5GB"; larger weights are split. By default as Diffusers does.

    Raises:
        ValueError: if `source` cannot be loaded, or is no pipeline but a variant or shards are asked for.
        OSError: if a file cannot be read or written.
    """
    check_source(source)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(MANIFEST, "*.py", ".*"))
    if variant or max_shard_size:
        if not has_index(source):
            raise ValueError(f"{source} is no pipeline: variants and shards are for those")
        _write_weights(source, folder, variant, max_shard_size)
    if has_index(folder) and not (folder / GRID).exists():
        _draw_grid(folder, repo)
    complete(folder, repo)


def _write_weights(source: Path, folder: Path, variant: str | None, max_shard_size: str | None) -> None:
    pipe, _ = load_pipeline(str(source), "cpu")
    split = {"max_shard_size": max_shard_size} if max_shard_size else {}
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for name, model in models.items():
        config = (folder / name / "config.json").read_text(encoding="utf-8")
        model.to(stored_dtype(folder / name))  # as loaded in float32 they have lost nothing
        for weights in folder.joinpath(name).glob("*.safetensors*"):
            weights.unlink()
        model.save_pretrained(folder / name, **split)
        if variant:
            model.half().save_pretrained(folder / name, variant=variant, **split)
        (folder / name / "config.json").write_text(config, encoding="utf-8")


def _draw_grid(folder: Path, name: str) -> None:
    """Draw each class of the training four times, or each of its validation prompts; nothing where it had neither."""
    file = folder / TRAINING
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    prompts = record.get("config", {}).get("validation_prompts", [])
    banks = [bank for bank in record.get("caption_banks", []) if (BANK_FOLDER / f"{bank}.yaml").is_file()]
    if not banks and not prompts:
        return
    pipe, facts = load_pipeline(str(folder))
    studio = open_studio(pipe, {**facts, "model": name})
    if banks:
        generate_grid(studio, LabelledSet(load_bank(banks[0]), 4), folder / GRID)
    else:
        shutil.rmtree(generate_prompts(studio, prompts, 4, 0, folder / GRID))


def check_repo(folder: Path, variant: str | None = None) -> None:
    """Load a folder in fresh processes as its users will: with this package, and a pipeline also by its own code.

    Raises:
        ValueError: if it does not load, or the two draw different images from one seed.
        OSError: if the model that an adapter was made for is neither here nor on the Hub.
    """
    if is_adapter(folder):
        base, _ = find_model(base_of(folder))
        _try(TRY_ADAPTER, str(folder), str(base))
        return
    if not has_index(folder):
        _try(TRY_DUAL_ENCODER if is_dual_encoder(folder) else TRY_ENCODER, str(folder))
        return
    drawn = _try(TRY_PIPELINE, str(folder), "package")
    if variant:
        _try(TRY_PIPELINE, str(folder), "package", variant)
    if code_of(folder) and _try(TRY_PIPELINE, str(folder), "code") != drawn:
        raise ValueError(f"{folder} draws other images by its own code than by visbio_diffusers")


def _try(code: str, *arguments: str) -> str:
    """Run Python in a fresh process without the Hub, and return what it prints."""
    with tempfile.TemporaryDirectory() as modules:
        settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise ValueError(f"{arguments[0]} does not load: {reason}")
    return done.stdout.strip()


def upload(
    folder: Path, repo_id: str, revision: str | None = None, create_pr: bool = False, message: str | None = None
) -> str:
    """Upload a folder as one commit after which the repo has its weights and no others, and return where to see it.

    When it was interrupted, the same call sends only the large files that had not arrived.

    Args:
        folder (`Path`): of [`write_repo`].
        repo_id (`str`): of [`open_repo`].
        revision (`str`, *optional*): a branch, created if there is none.
        create_pr (`bool`): open a pull request instead.
        message (`str`, *optional*): of the commit.

    Raises:
        ValueError: if the Hub refuses the metadata of the card.
        OSError: if the Hub cannot be reached or refuses it.
    """
    api = HfApi()
    try:
        if revision and not create_pr and not revision.startswith("refs/"):  # of a pull request that is there
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or "Upload with visbio_diffusers",
            delete_patterns=["*.safetensors", "*.safetensors.index*.json"] if has_index(folder) else None,
        )
    except HUB_ERRORS as error:
        raise _unreachable(error) from error
    except RuntimeError as error:  # of a file that did not arrive, whose cause is its cause
        raise _unreachable(error.__cause__ or error) from error
    except ValueError as error:  # some refusals of the Hub are one too, which were told above
        raise ValueError(f"{one_line(error)} (the metadata at the head of {CARD} come from {ABOUT})") from error
    return str(info.pr_url or info.commit_url)


@contextmanager
def made_repo(
    source: Path, repo: str, variant: str | None = None, max_shard_size: str | None = None
) -> Iterator[Path]:
    """Give a temporary folder with the repo of what was trained, written and tried; arguments of [`write_repo`]."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, repo.split("/")[-1])
        write_repo(source, folder, repo, variant, max_shard_size)
        check_repo(folder, variant)
        yield folder


def repo_of_training(config, is_main_process: bool) -> str:
    """Return the repo to which a training will publish, empty for none; asked before anything is trained.

    Raises:
        ValueError, OSError: see [`open_repo`].
    """
    if not config.push_to_hub or not is_main_process:
        return ""
    return open_repo(config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_private_repo)


def finish_training(folder: Path, config, repo_id: str) -> None:
    """Write the card of what a training has made, and publish it to the repo of [`repo_of_training`] if there is one.

    Raises:
        OSError: if that fails; the message says that the training is safe, and the command that tries again.
    """
    complete(folder, Path(config.output_dir).resolve().name)
    if not repo_id:
        return
    try:
        with made_repo(folder, repo_id) as repo:
            logger.info(f"published: {upload(repo, repo_id)}")
    except (ValueError, OSError) as error:
        raise OSError(
            f"{one_line(error)}; what was trained is safe in {folder}, and goes to the Hub by: "
            f"python train_scripts/push_to_hub.py --folder {folder} --hub_model_id {repo_id}"
        ) from error


def _unreachable(error: Exception) -> OSError:
    if isinstance(error, OfflineModeIsEnabled):
        return OSError("HF_HUB_OFFLINE is set: unset it to reach the Hub")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (400, 401, 403, 404, 413, 422):
        return OSError(f"the Hub refused it ({one_line(error)}): mend that, then the same command goes on")
    return OSError(f"the Hub did not take it ({one_line(error)}): try the same command again, nothing is lost")
