"""Samplers: which is chosen, what a model is told, and the script, which goes on where it was killed."""

import itertools
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.evaluation.plots import plot_curves
from visbio_diffusers.evaluation.samplers import cheapest, curves, render_samplers


ROOT = Path(__file__).parent.parent


def a_run(sampler, steps, distance, guidance=1.0, interval=(0, 1)):
    judges = {"cnn3": {"frechet": distance, "within_class_distance": 0.9, "fidelity": 0.97}}
    return {
        "sampler": sampler, "num_inference_steps": steps, "guidance_scale": guidance, "guidance_interval": [*interval],
        "guidance_rescale": 0.0,
        "judges": judges,
    }  # fmt: skip


def test_cheapest_counts_guided_steps_twice_and_stays_within_a_tenth_of_the_best():
    runs = [a_run("ddim", 50, 1.0), a_run("unipc", 12, 1.09, guidance=1.5), a_run("unipc", 20, 1.08)]
    assert cheapest(runs, "cnn3")["num_inference_steps"] == 20
    assert cheapest([*runs, a_run("unipc", 8, 1.11)], "cnn3")["num_inference_steps"] == 20


def test_what_was_guided_in_an_interval_is_no_default():
    limited = a_run("unipc", 8, 0.5, guidance=1.5, interval=(0.2, 0.8))
    assert cheapest([a_run("unipc", 12, 1.0), limited], "cnn3")["num_inference_steps"] == 12
    with pytest.raises(ValueError, match="measure one without"):
        cheapest([limited], "cnn3")


def test_curves_take_the_best_guidance():
    runs = [a_run("ddim", 8, 3.0), a_run("ddim", 4, 5.0), a_run("ddim", 8, 2.0, 1.5), a_run("unipc", 8, 1.0)]
    runs.append({**a_run("unipc", 8, 0.8), "timestep_spacing": "cosine"})
    found = curves(runs, "cnn3")
    assert found == {"ddim": [(4, 5.0), (8, 2.0)], "unipc": [(8, 1.0)], "unipc, cosine": [(8, 0.8)]}
    assert plot_curves(found, "steps", "FD").size == (560, 360)
    table = render_samplers(
        {"floor": {"cnn3": 0.1}, "runs": runs, "asked": {"num_images": 64}, "command": "a command"}
    )
    assert "| unipc | 8 | 1 | 1.00 | 0.970 | 0.90 |" in table
    assert "| unipc, cosine | 8 | 1 | 0.80 | 0.970 | 0.90 |" in table


@pytest.fixture(scope="module")
def cells(visbio_data, tmp_path_factory):
    """A few real cells of every class."""
    file = tmp_path_factory.mktemp("cells") / "bloodmnist_few.npz"
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        np.savez(file, **{name: real[name][:200] for name in real.files})
    return file


def test_script_measures_goes_on_and_sets_the_defaults(cells, tiny_pipeline_dir, tmp_path):
    script = runpy.run_path(str(ROOT / "train_scripts" / "evaluate_samplers.py"))
    model = shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    output = tmp_path / "samplers.json"
    flags = ["--model", str(model), "--dataset_name", str(cells), "--output", str(output), "--num_images", "16"]
    flags += ["--samplers", "dpmsolver++", "--steps", "1", "2", "--guidance_scale", "1.0", "--device", "cpu"]
    flags += ["--guidance_interval", "0", "1", "0.2", "0.8", "--timestep_spacing", "even", "cosine"]
    flags += ["--evaluator_steps", "2", "--evaluators", str(tmp_path / "judges")]

    def measure(*more):
        assert script["main"](script["parse"](script["EvaluateSamplersConfig"], {}, [*flags, *more])) == 0
        return json.loads(output.read_text())

    first = measure()
    found = [(run["timestep_spacing"], run["num_inference_steps"], run["guidance_interval"]) for run in first["runs"]]
    assert found == list(itertools.product(["even", "cosine"], [1, 2], [[0, 1], [0.2, 0.8]]))
    assert set(first["runs"][0]["judges"]) == set(first["floor"]) == {"cnn3", "cnn5", "simclr"}
    assert Image.open(tmp_path / "samplers.png").size == (560, 360)

    output.write_text(json.dumps({**first, "runs": first["runs"][:7]}))  # as if killed
    again = measure("--save_default", "true")
    assert again["runs"][:7] == first["runs"][:7] and again["runs"][7]["judges"] == first["runs"][7]["judges"]
    best = cheapest(again["runs"], "cnn3")
    pipe = VisBioPipeline.from_pretrained(model)
    assert pipe.scheduler.config.algorithm_type == "dpmsolver++"
    assert pipe.config.num_inference_steps == best["num_inference_steps"] and pipe.config.guidance_scale == 1
    assert (pipe.config.timestep_spacing or "even") == best["timestep_spacing"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samplers", "euler"], "samplers are ddim, dpmsolver"),
        (["--timestep_spacing", "even", "karras"], "timestep_spacing is even or cosine, got even, karras"),
        (["--guidance_interval", "0.5"], "guidance_interval must be pairs of low and high"),
        (["--num_images", "8"], "num_images at least 16"),
    ],
)
def test_settings_that_cannot_work(flags, message, capsys):
    script = runpy.run_path(str(ROOT / "train_scripts" / "evaluate_samplers.py"))
    needed = ["--model", "m", "--dataset_name", "d", "--output", "o.json"]
    with pytest.raises(SystemExit):
        script["parse"](script["EvaluateSamplersConfig"], {}, [*needed, *flags])
    assert message in capsys.readouterr().err
