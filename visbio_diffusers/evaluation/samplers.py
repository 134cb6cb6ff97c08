"""Which samplers are compared, how a model is told its best one, and the table for its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from visbio_diffusers.files import whole_file


SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}
NEAR = 1.1  # a distance that counts as that of the best


def make_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return one of SAMPLERS with the noise schedule of a scheduler."""
    scheduler_class, settings = SAMPLERS[name]
    return scheduler_class.from_config(scheduler.config, **settings)


def cheapest(runs: list[dict], judge: str) -> dict:
    """Return the run with the fewest predictions of those that come within a tenth of the best distance.

    Runs guided in an interval or rescaled are left out, as a model's folder cannot say so.

    Raises:
        ValueError: if that leaves none.
    """
    runs = [run for run in runs if run["guidance_scale"] <= 1 or _is_plain(run)]
    if not runs:
        raise ValueError("all were guided in an interval or rescaled, which is no default: measure one without")
    best = min(run["judges"][judge]["frechet"] for run in runs)
    near = [run for run in runs if run["judges"][judge]["frechet"] <= NEAR * best]
    return min(near, key=lambda run: run["num_inference_steps"] * (1 + (run["guidance_scale"] > 1)))


def _is_plain(run: dict) -> bool:
    """Return whether all steps of a run were guided, and nothing was rescaled."""
    return list(run["guidance_interval"]) == [0, 1] and not run["guidance_rescale"]


def save_defaults(folder: Path, scheduler: SchedulerMixin, **defaults: Any) -> None:
    """Let a saved pipeline draw so where a call says nothing else.

    Args:
        folder (`Path`): of the pipeline.
        scheduler (`SchedulerMixin`): takes the place of its own.
        defaults: `num_inference_steps`, `guidance_scale` and `timestep_spacing` of `VisBioPipeline`.
    """
    scheduler.save_pretrained(folder / "scheduler")
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", type(scheduler).__name__], **defaults}
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n")


def _name(run: dict) -> str:
    """Return the sampler of a run, and its spacing if that is not an even one."""
    spacing = run.get("timestep_spacing", "even")
    return run["sampler"] if spacing == "even" else f"{run['sampler']}, {spacing}"


def curves(runs: list[dict], judge: str) -> dict[str, list[tuple[float, float]]]:
    """Return the points (steps, distance) of each sampler, at its best guidance."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        points = found.setdefault(_name(run), {})
        steps, value = run["num_inference_steps"], run["judges"][judge]["frechet"]
        points[steps] = min(value, points.get(steps, value))
    return {name: sorted(points.items()) for name, points in found.items()}


def render_samplers(results: dict) -> str:
    """Return the Markdown table of what `evaluate_samplers.py` has measured."""
    judges = list(results["floor"])
    lines = [
        f"| Sampler | Steps | Guidance | {' | '.join(f'FD-{name}' for name in judges)} | Recognised | Within-class |",
        "|" + " --- |" * (5 + len(judges)),
    ]
    for run in results["runs"]:
        low, high = run["guidance_interval"]
        guidance = f"{run['guidance_scale']:g}" + (f" in {low:g} to {high:g}" if (low, high) != (0, 1) else "")
        found = run["judges"].values()
        fidelity = min(each["fidelity"] for each in found if "fidelity" in each)
        spread = sum(each["within_class_distance"] for each in found) / len(judges)
        cells = [_name(run), run["num_inference_steps"], guidance]
        cells += [f"{run['judges'][name]['frechet']:.2f}" for name in judges] + [f"{fidelity:.3f}", f"{spread:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    floor = " and ".join(f"{value:.2f} ({name})" for name, value in results["floor"].items())
    lines += [
        "",
        f"n = {results['asked']['num_images']} images of plain captions from the same noise; as many real training"
        f" images have {floor}. Recognised: by the classifier that recognises fewer.",
        "",
        f"`{results['command']}`",
    ]
    return "\n".join(lines) + "\n"
