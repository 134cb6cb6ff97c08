"""Measure a text-to-image model of labelled images, or any set of labelled images, against a real data set.

accelerate launch train_scripts/evaluate.py --model model_cards/visbio-blood-28 --dataset_name bloodmnist \
    --output results.json
python train_scripts/evaluate.py --images generated.npz --dataset_name bloodmnist --output results.json
python train_scripts/evaluate.py --model runs/blood --dataset_name bloodmnist --guidance_scale 1 1.5 2 \
    --output sweep.json

The first run on a data set trains its judges on the train split and keeps them in `--evaluators`. The same command
again goes on where it was killed. `visbio evaluate` takes the same flags, on one machine without a launcher.
"""

from visbio_diffusers.config import parse, run
from visbio_diffusers.evaluation.benchmark import EvaluateConfig, evaluate


if __name__ == "__main__":
    run(evaluate, parse(EvaluateConfig, {}))
