"""Checkpoint folders that are either whole or absent: atomic save, verification, fallback, pruning."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_model

from visbio_diffusers.files import digest


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
_OTHER = "{} was saved with other weights than are trained now: resume with its settings"


class Stateful(Protocol):
    """Anything with `state_dict` and `load_state_dict`: an LR scheduler, an EMA, a data stream."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...  # noqa: D102


def register(accelerator: Accelerator, name: str, obj: Stateful) -> None:
    """Save the state of `obj` as `name`.pt in every checkpoint and restore it from there.

    Used in place of `Accelerator.register_for_checkpointing`, which unpickles without `weights_only`.

    Args:
        name (`str`): file name in the checkpoint, unique in one run.
        obj (`Stateful`): its state holds only tensors, numbers, strings, lists and dicts.
    """

    def save_state(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            torch.save(obj.state_dict(), Path(folder) / f"{name}.pt")

    def load_state(models: list, folder: str) -> None:
        file = Path(folder) / f"{name}.pt"
        if not file.exists():
            raise FileNotFoundError(f"{folder} holds no {name}.pt; resume with the settings that it was saved with")
        # Not `accelerator.device`: torch restores nothing to its "cpu:0". A bare type means the device in use.
        device = accelerator.device.type
        obj.load_state_dict(torch.load(file, map_location=device, weights_only=True))

    accelerator.register_save_state_pre_hook(save_state)
    accelerator.register_load_state_pre_hook(load_state)


def unwrap_weights(accelerator: Accelerator) -> None:
    """Save what is trained, under the names of the bare model: it may resume on another number of processes.

    Weights that are frozen, like those below an adapter, are left out, and must be there when a run is resumed.
    """

    def bare(model: torch.nn.Module) -> tuple[torch.nn.Module, set[str]]:
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        return model, {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def save_state(models: list, weights: list, folder: str) -> None:
        for index, (model, frozen) in enumerate(map(bare, models)):
            kept = {}  # tied weights once, by the place of their memory
            for name, value in model.state_dict().items():
                kept.setdefault((value.data_ptr(), value.shape) if value.numel() else name, (name, value))
            weights[index] = {name: value.contiguous() for name, value in kept.values() if name not in frozen}

    def load_state(models: list, folder: str) -> None:
        for index, (model, frozen) in enumerate(map(bare, models)):
            file = Path(folder, f"model_{index}.safetensors" if index else "model.safetensors")
            try:
                missing, unexpected = load_model(model, file, strict=False)
            except RuntimeError as error:  # of other shapes
                raise ValueError(f"{_OTHER.format(folder)} ({str(error).splitlines()[-1].strip()})") from error
            other = sorted({*missing, *unexpected} - frozen)
            if other:
                raise ValueError(f"{_OTHER.format(folder)} ({other[0]})")
        models.clear()  # so that Accelerate loads none

    accelerator.register_save_state_pre_hook(save_state)
    accelerator.register_load_state_pre_hook(load_state)


def save(accelerator: Accelerator, output_dir: str | Path, step: int, limit: int = 0) -> Path:
    """Write `output_dir`/checkpoint-`step` through a temporary folder, on all processes, and prune older ones.

    The folder appears under its name only when every file is on disk and listed in its manifest.

    Args:
        step (`int`): optimizer steps taken.
        limit (`int`): checkpoints to keep, this one included; 0 keeps all.

    Raises:
        OSError: if the disk is full or not writable; the earlier checkpoints stay as they were.
    """
    folder = Path(output_dir) / f"{PREFIX}{step:07d}"
    temporary = folder.with_name(f".tmp-{folder.name}")
    with _explained(folder):
        if accelerator.is_main_process:
            for stale in folder.parent.glob(f".tmp-{PREFIX}*"):
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                seal(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if accelerator.is_main_process and limit:
        prune(output_dir, limit)
    accelerator.wait_for_everyone()
    return folder


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the different errors of torch, safetensors and the system at a full disk into one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"cannot write {target}: {reason}; earlier checkpoints are untouched: "
            "make room or permit writing, then --resume_from_checkpoint latest"
        ) from error


def seal(temporary: Path, folder: Path) -> None:
    """Flush every file below `temporary`, write its manifest last, and rename it to `folder`.

    A folder that stands under that name already is replaced.
    """
    files = {}
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        files[file.relative_to(temporary).as_posix()] = {"size": file.stat().st_size, "sha256": digest(file)}
        _fsync(file)
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    _fsync(manifest)
    for directory in {path.parent for path in temporary.rglob("*")}:
        _fsync(directory)
    if folder.exists():
        replaced = folder.with_name(f".tmp-{folder.name}-replaced")
        os.replace(folder, replaced)
        os.replace(temporary, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(temporary, folder)
    _fsync(folder.parent)


def verify(folder: str | Path) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file is missing, cut short or altered; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {folder}")
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged: {MANIFEST} is missing or unreadable") from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if file.stat().st_size != expected["size"]:
            raise ValueError(
                f"{folder} is damaged: {name} has {file.stat().st_size} bytes instead of {expected['size']}"
            )
        if digest(file) != expected["sha256"]:
            raise ValueError(f"{folder} is damaged: the content of {name} has changed")


def find(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir`, intact or not, oldest first."""
    folders = (path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(folders, key=step_of)


def step_of(folder: str | Path) -> int:
    """Return the number of optimizer steps in the name of a checkpoint folder.

    Raises:
        ValueError: if the folder has another kind of name.
    """
    number = Path(folder).name.removeprefix(PREFIX)
    if not number.isdecimal():
        raise ValueError(f"{folder} is not named like a checkpoint ({PREFIX}0000500)")
    return int(number)


def latest(output_dir: str | Path) -> Path | None:
    """Return the newest intact checkpoint in `output_dir`, or None; each damaged one passed over is logged."""
    for folder in reversed(find(output_dir)):
        try:
            verify(folder)
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
        else:
            return folder
    return None


def to_resume(output_dir: str | Path, wanted: str) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` `wanted` names, verified; None is a fresh start.

    Damaged checkpoints newer than `latest` are renamed to damaged-checkpoint-*, so that they are not met again.

    Args:
        wanted (`str`): "latest" (a fresh start if there is none), a folder, its name in `output_dir`, or empty.

    Raises:
        FileNotFoundError: if the named folder does not exist.
        ValueError: if the named folder is damaged, or would be mixed with newer checkpoints of another run.
    """
    present = find(output_dir)
    if wanted == "latest":
        folder = latest(output_dir)
        if folder is None and present:
            raise ValueError(f"no checkpoint in {output_dir} is intact: choose another --output_dir to start afresh")
        for damaged in present[present.index(folder) + 1 :] if folder else []:
            damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
        return folder
    if not wanted:
        if present:
            raise ValueError(
                f"{output_dir} holds {present[-1].name} of an earlier run: "
                "add --resume_from_checkpoint latest, or choose another --output_dir"
            )
        return None
    folder = Path(wanted) if Path(wanted).exists() else Path(output_dir, wanted)
    step = step_of(folder)
    verify(folder)
    if present and step_of(present[-1]) > step:
        raise ValueError(f"{present[-1]} is newer than {folder}: move it away, or choose another --output_dir")
    return folder


def prune(output_dir: str | Path, limit: int) -> None:
    """Delete the oldest checkpoints in `output_dir` until `limit` remain."""
    for folder in find(output_dir)[:-limit]:
        shutil.rmtree(folder)


def append_log(file: Path, lines: list[str]) -> None:
    """Append whole lines to `file` and wait until they are on disk.

    Raises:
        OSError: if the disk is full or not writable.
    """
    with _explained(file), file.open("a") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())


def truncate_log(file: Path, step: int) -> None:
    """Cut the JSON lines after `step` off `file`, and a last line that a kill left unfinished."""
    if not file.exists():
        return
    kept = 0
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += len(line)
    os.truncate(file, kept)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_folder(folder: str | Path, write: Callable[[Path], Any]) -> Path:
    """Call `write` on a temporary folder beside `folder`, then put that in its place, with a manifest.

    Args:
        write: fills the folder that it is given, for example `pipeline.save_pretrained`.

    Raises:
        OSError: if the disk is full or not writable; what stood under `folder` before is untouched.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    with _explained(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            seal(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder
