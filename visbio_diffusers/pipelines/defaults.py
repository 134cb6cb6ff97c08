"""What an argument of a pipeline's call is where it is left out."""

import inspect
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def call_default(pipe: DiffusionPipeline, name: str) -> Any:
    """Return the default of an argument of a pipeline's call, or for None that of its model, if it has one."""
    value = inspect.signature(type(pipe).__call__).parameters[name].default
    return pipe.config.get(name) if value is None else value
