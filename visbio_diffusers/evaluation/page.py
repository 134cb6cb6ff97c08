"""The results as one HTML file that opens offline: tables, charts with intervals, confusions, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from visbio_diffusers.evaluation.report import card_rows
from visbio_diffusers.files import whole_file
from visbio_diffusers.grid import data_url


TEMPLATE = "page.html.j2"
WORST_PROMPTS = 20


def write_page(results: dict, pictures: dict[str, Image.Image], path: str | Path) -> None:
    """Write results and pictures as one HTML file, whole or not at all.

    Args:
        results (`dict`): content of a results.json.
        pictures (`dict[str, PIL.Image.Image]`): title -> picture, kept inside the file.

    Raises:
        OSError: if the file cannot be written.
    """
    classifiers = [judge for judge in results["evaluators"] if judge["real_test"]]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    header, *rows = card_rows(results)
    text = environment.get_template(TEMPLATE).render(
        results=results,
        header=header,
        rows=rows,
        charts=[chart for run in results["runs"] for chart in _charts(run, classifiers)],
        confusions=[_confusion(run, judge) for run in results["runs"] for judge in classifiers],
        worst=_worst_prompts(results["runs"][0], results["evaluators"][0]["name"]),
        pictures={title: data_url(picture) for title, picture in pictures.items()},
    )
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _charts(run: dict, judges: list[dict]) -> list[dict[str, Any]]:
    """Return charts of shares per class: those recognised, beside real test images, with their intervals."""
    charts = []
    for judge in judges:
        generated = run["evaluators"][judge["name"]]["fidelity"]["per_class"]
        real = judge["real_test"]["per_class"]
        bars = [{"name": name, "generated": entry, "real": real.get(name)} for name, entry in generated.items()]
        charts.append({"title": f"Recognised as their class by {judge['name']}", "bars": bars})
    return charts


def _confusion(run: dict, judge: dict) -> dict[str, Any]:
    """Return a confusion matrix with shares of each row, the depth of colour; classes without images have no row."""
    counts = run["evaluators"][judge["name"]]["fidelity"]["confusion"]
    names = list(judge["class_names"])
    rows = [
        (name, [(count, count / sum(row)) for count in row])
        for name, row in zip(names, counts, strict=True)
        if sum(row)
    ]
    return {"title": f"Prompted class (row) and answer of {judge['name']} (column)", "names": names, "rows": rows}


def _worst_prompts(run: dict, judge: str) -> list[tuple[str, dict]]:
    if "heldout_wording" not in run:
        return []
    prompts = run["heldout_wording"][judge]["per_prompt"]
    return sorted(prompts.items(), key=lambda item: (item[1]["value"], -item[1]["n"]))[:WORST_PROMPTS]
