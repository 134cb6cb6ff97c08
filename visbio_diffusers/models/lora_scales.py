"""Weights of an adapter that differ from block to block."""

from collections.abc import Iterable


def layer_scales(layers: Iterable[str], scale: float | dict) -> float | dict[str, float]:
    """Return the weight of an adapter in every layer.

    Args:
        layers (`Iterable[str]`): names of the adapted layers, such as "down_blocks.0.resnets.1.conv1".
        scale (`float` or `dict`): one weight for all, or those of "down", "mid" and "up": a number each; of "down" and
            "up" also a dict from "block_0" and so on to a number or to a list with one number for each residual block;
            of "mid" a list with one number for each transformer block. What is not named has weight 1.

    Returns:
        The number, or a dict from layer to number.

    Raises:
        ValueError: if the dict names other blocks, or a list is too short.
    """
    if not isinstance(scale, dict):
        return scale
    unknown = set(scale) - {"down", "mid", "up"}
    if unknown:
        raise ValueError(
            f"an adapter has weights for down, mid and up, not for {', '.join(sorted(map(str, unknown)))}"
        )
    return {layer: _scale_of(layer, scale) for layer in layers}


def _scale_of(layer: str, scale: dict) -> float:
    part, *rest = layer.split(".")
    if part == "mid_block":  # mid_block.transformer_blocks.3.attn1.to_q
        place = ["mid", int(rest[1])]
    elif part in ("down_blocks", "up_blocks"):  # down_blocks.0.resnets.1.conv1, down_blocks.0.downsampler
        place = [part.removesuffix("_blocks"), f"block_{rest[0]}", int(rest[2]) if rest[1] == "resnets" else None]
    else:
        return 1.0
    found = scale
    for key in place:
        if isinstance(found, dict):
            found = found.get(key, 1.0)
        elif isinstance(found, list):
            found = 1.0 if key is None else dict(enumerate(found)).get(key)
    if not isinstance(found, (int, float)):
        raise ValueError(f"weights {scale} give no number for {layer}: a list has one for each block within")
    return float(found)
