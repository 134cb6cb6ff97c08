"""Results as files: what was measured, where, with which versions, and the table that model cards show."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import visbio_diffusers
from visbio_diffusers.evaluation.neighbours import MANIFOLD_MEASURES
from visbio_diffusers.files import whole_file


PACKAGES = ("torch", "diffusers", "transformers", "numpy")


def environment() -> dict:
    """Return versions, git state, hardware and command of this process, as JSON values."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "visbio_diffusers": visbio_diffusers.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "git": git_state(Path(visbio_diffusers.__file__).parents[1]),
        "hardware": {
            "machine": platform.machine(),
            "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
        "command": _command(sys.argv),
    }


def _command(argv: list[str]) -> str:
    """Return the command line as one would type it, without the folder of an installed program."""
    program = Path(argv[0])
    return shlex.join(["python", *argv] if program.suffix == ".py" else [program.name, *argv[1:]])


def git_state(folder: Path) -> dict | None:
    """Return `commit` and `dirty` (uncommitted changes) of a git checkout; None for an installed package."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)

    head, status = git("rev-parse", "--verify", "HEAD"), git("status", "--porcelain")
    if status.returncode:  # such as a checkout of another user's
        return None
    commit = head.stdout.strip() if head.returncode == 0 else None  # None: nothing committed yet
    return {"commit": commit, "dirty": bool(status.stdout.strip())}


def write_results(results: dict, path: str | Path) -> None:
    """Write results as JSON, whole or not at all.

    Raises:
        OSError: if the file cannot be written; what stood there before is untouched.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_card_results(results: dict) -> str:
    """Return the results as a Markdown table with 95 % intervals, one column per run, and a line that names the run.

    Args:
        results (`dict`): content of a results.json.
    """
    rows = card_rows(results)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join([*lines, "", _footnote(results)]) + "\n"


def card_rows(results: dict) -> list[list[str]]:
    """Return the rows of the table, its header first: measure, each run, real images."""
    runs = results["runs"]
    rows = [["Measure (95 % interval)", *map(_run_title, runs), "Real images"]]
    for judge in results["evaluators"]:
        rows += _judge_rows(judge, runs)
    rows += _alignment_rows(results["alignment_evaluator"], runs)
    rows += _copy_rows("nearest in pixels", [run["near_copies_pixels"] for run in runs])
    scores = [run.get("classification_accuracy_score") for run in runs]
    if all(scores):
        real = results["real_training_images"]["classification_accuracy_score"]
        title = "Accuracy on real test images of a classifier trained on these images alone (CAS)"
        rows.append([title, *map(cell, scores), cell(real)])
    return rows


def render_benchmark(results: list[dict]) -> str:
    """Return rows of the benchmark as a Markdown table with 95 % intervals.

    Args:
        results (`list[dict]`): contents of the results.json of `train_scripts/benchmark.py`, one for each row.
    """
    header = [
        "Row", "Training", "Recognised", "In other words", "FD / real", "FD-simclr / real", "Coverage",
        "Near-copies", "Command",
    ]  # fmt: skip
    rows = [header, ["---"] * len(header), *map(_benchmark_row, results)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _benchmark_row(results: dict) -> list[str]:
    run = results["runs"][0]
    first, blind = (run["evaluators"][name] for name in ("cnn3", "simclr"))
    training = "-"
    if "images_seen" in results:
        training = f"{results['images_seen']:,} images, {results['training_seconds'] / 60:.0f} min"
    cells = [
        first["fidelity"]["overall"],
        run.get("heldout_wording", {}).get("cnn3", {}).get("overall"),
        first["frechet"]["ratio"],
        blind["frechet"]["ratio"],
        blind["manifold"]["generated"]["coverage"],
        run["near_copies_pixels"]["0.05"],
    ]
    digits = [3, 3, 1, 1, 3, 3]
    shown = [cell(entry, digits=number) for entry, number in zip(cells, digits, strict=True)]
    return [results["row"].replace("_", " "), training, *shown, f"`{results['command']}`"]


def between_markers(text: str, marker: str, content: str) -> str:
    """Return `text` with `content` in place of what stands between the two HTML comments of `marker`.

    Raises:
        ValueError: if `text` lacks one of them.
    """
    begin, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the text lacks the lines {begin.strip()} and {end}")
    before, rest = text.split(begin, maxsplit=1)
    return before + begin + content + end + rest.split(end, maxsplit=1)[1]


def _run_title(run: dict) -> str:
    scale, adapter = run.get("guidance_scale"), run.get("lora_scale")
    title = "Generated" if scale is None else f"Generated, guidance {scale:g}"
    if adapter is not None:
        title += f", adapter x {adapter:g}" if adapter else ", without adapter"
    return title


def cell(entry: dict | None, digits: int = 3, scale: float = 1) -> str:
    """Return a value with its interval as text, a dash for None."""
    if entry is None:  # too few images to tell
        return "-"
    value, low, high = (entry[name] * scale for name in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _judge_rows(judge: dict, runs: list[dict]) -> list[list[str]]:
    name = judge["name"]
    measured = [run["evaluators"][name] for run in runs]
    floor = cell(measured[0]["frechet"]["floor"])
    rows = [] if judge["real_test"] is None else _recognition_rows(judge, runs)
    rows += [
        _row(f"Distance within a class, generated / real ({name})", measured, "within_class_distance", "ratio", "1"),
        _row(f"FD-{name} to real test images", measured, "frechet", "value", floor),
        _row(f"FD-{name} / that of as many real training images", measured, "frechet", "ratio", "1"),
    ]
    kernel = [entry["kernel_distance"] for entry in measured]
    cells = [cell(entry, scale=1000) for entry in [*(each["generated"] for each in kernel), kernel[0]["real"]]]
    rows.append([f"Kernel distance of {name} features to real test images, x 1000", *cells])
    for measure in MANIFOLD_MEASURES:
        cells = [cell(entry["manifold"]["generated"][measure]) for entry in measured]
        rows.append([f"{measure.capitalize()} ({name})", *cells, cell(measured[0]["manifold"]["real"][measure])])
    return rows + _copy_rows(f"nearest in features of {name}", [m["near_copies"] for m in measured])


def _alignment_rows(judge: dict, runs: list[dict]) -> list[list[str]]:
    """Return the rows on images and their prompts."""
    rows, name = [], judge["name"]
    for key, title in (("alignment", "prompts"), ("heldout_wording_alignment", "prompts in held-out wording")):
        if all(key in run for run in runs):
            measures = {"score": f"100 x cosine of images and {title} ({name})"}
            measures["retrieval"] = f"Images nearer to their {title} than to other classes' ({name})"
            for measure, text in measures.items():
                rows.append([text, *(cell(run[key][measure]) for run in runs), cell(judge["real_test"][measure])])
    return rows


def _recognition_rows(judge: dict, runs: list[dict]) -> list[list[str]]:
    """Return the rows that only a classifier has."""
    name, real = judge["name"], cell(judge["real_test"]["overall"])
    measured = [run["evaluators"][name] for run in runs]
    rows = [_row(f"Recognised as the class in the prompt ({name})", measured, "fidelity", "overall", real)]
    if all("heldout_wording" in run for run in runs):
        cells = [cell(run["heldout_wording"][name]["overall"]) for run in runs]
        rows.append([f"The same, prompts in held-out wording ({name})", *cells, real])
    title = f"Distance within a class, recognised images only ({name})"
    return [*rows, _row(title, measured, "recognised_within_class_distance", "ratio", "1")]


def _row(title: str, measured: list[dict], measure: str, part: str, real: str) -> list[str]:
    return [title, *(cell(entry[measure][part]) for entry in measured), real]


def _copy_rows(space: str, copies: list[dict]) -> list[list[str]]:
    return [
        [f"Near-copies of training images, {space}, {quantile} of real test images", *cells, quantile]
        for quantile in copies[0]
        if (cells := [cell(entry[quantile]) for entry in copies])
    ]


def _footnote(results: dict) -> str:
    git = results["git"] or {}
    commit = (git.get("commit") or "none")[:12] + (" with changes" if git.get("dirty") else "")
    judges = [*results["evaluators"], results["alignment_evaluator"]]
    judges = ", ".join(f"{judge['name']} {judge['sha256'][:12]}" for judge in judges)
    return (
        f"n = {results['runs'][0]['n']} generated images, seed {results['seed']}, real images of {results['dataset']}"
        f" ({results['split']['num_test']} in its test split); evaluators trained on its train split: {judges};"
        f" commit {commit}; `{results['command']}`"
    )
