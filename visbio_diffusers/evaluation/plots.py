"""Plots for cards, drawn with Pillow."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont


COLOURS = "#1f4e9c", "#c0392b", "#2d8a4e", "#8e44ad", "#b7791f", "#444444"


def plot_curves(
    curves: dict[str, list[tuple[float, float]]], x_title: str, y_title: str, width: int = 560, height: int = 360
) -> Image.Image:
    """Return a picture of curves over logarithmic axes, named at the right.

    Args:
        curves (`dict[str, list[tuple[float, float]]]`): points (x, y) of each, ascending, both above 0.
        x_title, y_title (`str`): of the axes.
        width, height (`int`): in pixels.
    """
    picture, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(12)
    draw, (left, right, top, bottom) = ImageDraw.Draw(picture), (60, width - 130, 30, height - 45)
    xs, ys = (sorted({point[axis] for points in curves.values() for point in points}) for axis in (0, 1))
    low, high = ys[0] / 1.15, ys[-1] * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / xs[0]) / math.log(xs[-1] / xs[0]) if len(xs) > 1 else 0.5
        return left + across * (right - left), bottom - math.log(y / low) / math.log(high / low) * (bottom - top)

    draw.rectangle((left - 8, top, right + 8, bottom), outline="black")
    for x in xs:
        draw.text((place(x, low)[0], bottom + 4), f"{x:g}", fill="black", font=font, anchor="ma")
    for tick in range(5):
        y = low * (high / low) ** (tick / 4)
        draw.text((left - 12, place(xs[0], y)[1]), f"{y:.2g}", fill="black", font=font, anchor="rm")
    draw.text(((left + right) / 2, height - 6), x_title, fill="black", font=font, anchor="ms")
    draw.text((8, 6), y_title, fill="black", font=font)
    for number, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS * len(curves))):
        places = [place(*point) for point in points]
        draw.line(places, fill=colour, width=2)
        for across, down in places:
            draw.ellipse((across - 3, down - 3, across + 3, down + 3), fill=colour)
        draw.text((right + 16, top + 16 * number), name, fill=colour, font=font)
    return picture
