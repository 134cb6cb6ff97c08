"""Weights of an adapter that differ from block to block."""

from collections.abc import Iterable


def layer_scales(
    layers: Iterable[str], scale: float | dict, modules: Iterable[str] | None = None
) -> float | dict[str, float]:
    """Return the weight of an adapter in every layer.

    Args:
        layers (`Iterable[str]`): names of the adapted layers, such as "down_blocks.0.resnets.1.conv1".
        scale (`float` or `dict`): one weight for all, or those of "down", "mid" and "up": a number each; of "down" and
            "up" also a dict from "block_0" and so on to a number or to a list with one number for each residual block;
            of "mid" a list with one number for each transformer block. What is not named has weight 1.
        modules (`Iterable[str]`, *optional*): names of all modules of the model, whose blocks may be named also where
            none of their layers is adapted; by default `layers`.

    Returns:
        The number, or a dict from layer to number.

    Raises:
        ValueError: if the dict names blocks that the model lacks, or a list has not one number for each block.
    """
    if not isinstance(scale, dict):
        return scale
    layers = list(layers)
    places = {place[:end] for name in modules or layers for place in [_place(name)] for end in range(len(place) + 1)}
    _check(scale, (), places)
    return {layer: _scale_at(_place(layer), scale) for layer in layers}


def _place(name: str) -> tuple[str | int, ...]:
    """Return where a module is in the dict of weights: ("mid", 3), ("down", "block_0", 1), ("up", "block_1"), ()."""
    part, number, inner, index, *_ = [*name.split("."), "", "", "", ""]
    if part == "mid_block":  # mid_block.transformer_blocks.3.attn1.to_q
        return ("mid", int(inner)) if inner.isdigit() else ("mid",)
    if part not in ("down_blocks", "up_blocks"):
        return ()
    place = part.removesuffix("_blocks"), f"block_{number}"  # down_blocks.0.resnets.1.conv1, down_blocks.0.downsampler
    return () if not number else (*place, int(index)) if index.isdigit() else place


def _check(scale: float | dict | list, at: tuple, places: set[tuple]) -> None:
    within = [place[-1] for place in places if place[:-1] == at and len(place) == len(at) + 1]
    named = " of ".join(["adapter", *map(str, at)][::-1])
    if isinstance(scale, dict):
        for key, value in scale.items():
            if key not in within or isinstance(key, int):
                raise ValueError(f"{named} has no block {key!r}: it has {', '.join(sorted(map(str, within)))}")
            _check(value, (*at, key), places)
    elif isinstance(scale, list):
        if len(scale) != sum(isinstance(key, int) for key in within):
            raise ValueError(f"{named} has {len(scale)} weights {scale}: give one for each block within it")
    elif not isinstance(scale, (int, float)):
        raise ValueError(f"{named} has the weight {scale!r}: give a number")


def _scale_at(place: tuple[str | int, ...], scale: float | dict | list) -> float:
    for key in place:
        if isinstance(scale, dict):
            scale = scale.get(key, 1.0)
        elif isinstance(scale, list):
            scale = scale[key]
    return float(scale) if isinstance(scale, (int, float)) else 1.0  # a list of blocks, of what is beside them
