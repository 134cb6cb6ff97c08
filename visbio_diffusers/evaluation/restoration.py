"""Images drawn from images, against the originals: how near they are, pixel by pixel, and how real they look.

The two are at odds (Blau and Michaeli 2018, The perception-distortion tradeoff): the mean of all images that fit is
the nearest to the original, and blurred; one of them is sharp, and has twice the squared error. So tables have both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visbio_diffusers.evaluation.features import ImageClassifier, ImageEncoder, features, predictions
from visbio_diffusers.evaluation.metrics import Z_95, frechet_with_floor, proportion_interval
from visbio_diffusers.evaluation.report import cell


TASKS = {
    "reconstruction": "Reconstruction from noised copies, `VisBioImg2ImgPipeline`, by strength",
    "inpainting": "Inpainting of a square hole; PSNR and SSIM within it",
    "super_resolution": "Super-resolution",
    "denoising": "Denoising",
}
COLOURS = "#1f4e9c", "#c0392b"


def mean_interval(values: np.ndarray) -> dict:
    """Return the mean of values `(n,)` with its 95 % interval from the standard error: `dict(value, low, high, n)`."""
    mean, half = float(values.mean()), Z_95 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def distortion(images: np.ndarray, originals: np.ndarray) -> dict:
    """Return the mean PSNR (dB) and SSIM of uint8 images `(n, height, width, channels)` to their originals.

    Images that equal their originals, whose PSNR is infinite, count as if one value in them was off by one.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # of an extra

    best = 10 * np.log10(255**2 * originals[0].size)
    psnr, ssim = [], []
    for image, original in zip(images, originals, strict=True):
        same = np.array_equal(image, original)
        psnr.append(best if same else peak_signal_noise_ratio(original, image))
        ssim.append(structural_similarity(original, image, channel_axis=-1))
    return {"psnr": mean_interval(np.array(psnr)), "ssim": mean_interval(np.array(ssim))}


class Beholder:
    """Judges, and what they see in originals and in other real images.

    Args:
        judges (`dict[str, ImageEncoder]`): by name, in evaluation mode.
        originals (`np.ndarray` of shape `(n, height, width, channels)`): uint8, that are degraded and restored.
        labels (`np.ndarray` of shape `(n,)`): their classes.
        others (`np.ndarray` of shape `(m, height, width, channels)`): other real images, of the same kind.
    """

    def __init__(self, judges: dict[str, ImageEncoder], originals: np.ndarray, labels: np.ndarray, others: np.ndarray):
        self.judges, self.labels = judges, labels
        self.originals = {name: features(judge, originals) for name, judge in judges.items()}
        self.others = {name: features(judge, others) for name, judge in judges.items()}

    def __call__(self, images: np.ndarray) -> dict[str, Any]:
        """Return for each judge how far restored images `(n, ...)` are from the originals and from real images.

        `frechet` is the distance to the other real images, beside that of the originals (`floor`); `paired` the mean
        distance of the features of an image and of its original; `recognised` the share seen as its class.
        """
        found = {}
        for name, judge in self.judges.items():
            own, originals, others = features(judge, images), self.originals[name], self.others[name]
            floor, weights = [(originals, np.ones(len(originals)))], np.ones(len(others))
            found[name] = {
                "frechet": frechet_with_floor(own, floor, others, weights),
                "paired": mean_interval(np.linalg.norm(own - originals, axis=1)),
            }
            if isinstance(judge, ImageClassifier):
                right = int((predictions(judge, own) == self.labels).sum())
                found[name]["recognised"] = proportion_interval(right, len(self.labels))
        return found


def render_restoration(results: dict) -> str:
    """Return the results of train_scripts/evaluate_reconstruction.py as Markdown tables with 95 % intervals."""
    judges = list(results["judges"])
    classifiers = [name for name in judges if results["judges"][name]["recognised"]]
    head = ["", "PSNR, dB", "SSIM", *(f"FD-{name}" for name in judges)]
    head += [f"Paired distance ({judges[0]})", *(f"Recognised ({name})" for name in classifiers[:1])]
    parts = []
    for task, title in TASKS.items():
        if task not in results["tasks"]:
            continue
        rows = [head, ["---"] * len(head)]
        for method, entry in results["tasks"][task].items():
            seen = entry["judges"]
            cells = [method, cell(entry["psnr"], 2), cell(entry["ssim"])]
            cells += [cell(seen[name]["frechet"]["value"], 2) for name in judges]
            cells += [cell(seen[judges[0]]["paired"], 2)]
            rows.append(cells + [cell(seen[name]["recognised"]) for name in classifiers[:1]])
        table = "".join("| " + " | ".join(row) + " |\n" for row in rows)
        parts.append(f"### {title}\n\n{table}")
    floors = ", ".join(f"FD-{name} {results['judges'][name]['floor']:.2f}" for name in judges)
    recognised = ", ".join(f"{cell(results['judges'][name]['recognised'])} ({name})" for name in classifiers)
    parts.append(
        f"{results['n']} images of the {results['split']} split of {results['dataset']}; {results['settings']}. FD: to"
        f" the {results['num_others']} other images of the split, from which the originals themselves have {floors}."
        " Paired: between features of an image and of its original. Of the originals are recognised"
        f" {recognised}. A caption names the class, which someone must know.\n\n"
        f"`{results['command']}`\n"
    )
    return "\n".join(parts)


def plot_strengths(entries: dict[float, dict], width: int = 560, height: int = 320) -> Image.Image:
    """Return a picture of PSNR (left axis) and SSIM (right axis) against strength.

    Args:
        entries (`dict[float, dict]`): by strength, [`distortion`] of the images.
        width, height (`int`): in pixels.
    """
    picture, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(12)
    draw, (left, right, top, bottom) = ImageDraw.Draw(picture), (50, width - 55, 30, height - 45)
    strengths = sorted(entries)

    def place(strength: float, share: float) -> tuple[float, float]:
        return left + strength * (right - left), bottom - share * (bottom - top)

    draw.rectangle((left, top, right, bottom), outline="black")
    for tick in range(0, 11, 2):
        x, _ = place(tick / 10, 0)
        draw.line((x, bottom, x, bottom + 4), fill="black")
        draw.text((x, bottom + 6), f"{tick / 10:g}", fill="black", font=font, anchor="ma")
    draw.text(((left + right) / 2, height - 6), "strength", fill="black", font=font, anchor="ms")
    ends = 5 * np.ceil(max(each["psnr"]["high"] for each in entries.values()) / 5), 1.0
    for key, end, colour, x, anchor in zip(("psnr", "ssim"), ends, COLOURS, (left - 5, right + 5), ("rm", "lm")):
        for tick in range(6):
            draw.text((x, place(0, tick / 5)[1]), f"{end * tick / 5:.3g}", fill=colour, font=font, anchor=anchor)
        title = {"psnr": "PSNR, dB", "ssim": "SSIM"}[key]
        draw.text((x, 6), title, fill=colour, font=font, anchor="la" if key == "psnr" else "ra")
        points = [place(each, entries[each][key]["value"] / end) for each in strengths]
        draw.line(points, fill=colour, width=2)
        for (across, down), each in zip(points, strengths):
            low, high = (place(each, entries[each][key][side] / end)[1] for side in ("low", "high"))
            draw.line((across, low, across, high), fill=colour, width=2)
            draw.ellipse((across - 3, down - 3, across + 3, down + 3), fill=colour)
    return picture
