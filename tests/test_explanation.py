"""`visbio explain`: one HTML file that is whole, opens offline and trusts no prompt."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from visbio_diffusers import VisBioPipeline, VisBioUNet
from visbio_diffusers.cli import main


HOSTILE = 'a cell <script src="https://example.org/x.js">alert(1)</script> & "more"'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """The tags of a page, all of which must be closed, its text, and what it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.references = [], set(), "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def explain(tiny_pipeline_dir, tmp_path, monkeypatch):
    """Return a function that runs `visbio explain` with the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(prompt, *more, model=tiny_pipeline_dir):
        flags = ["--model", str(model), "--device", "cpu", "--steps", "2", "--num-seeds", "3"]
        return main(["explain", prompt, "--output", "report.html", *flags, *more])

    return run


def test_report_is_one_file_without_links_and_escapes_prompts(explain, tmp_path, capsys):
    assert explain(HOSTILE, "--instead", "a <b>bold</b> cell", "--seed", "5") == 0
    assert capsys.readouterr().out == "report.html\n"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "b", "link", "iframe"}
    assert not re.search(r"@import|url\(", text)
    assert HOSTILE in page.text and "a <b>bold</b> cell" in page.text
    assert len(page.references) == 6
    for reference in page.references:
        kind, _, content = reference.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).load()
    record = json.loads(page.text[page.text.index("{\n") : page.text.rindex("}") + 1])
    assert record["prompt"] == HOSTILE and record["seeds"] == [5, 6, 7] and record["synthetic"] is True
    assert record["call"]["num_inference_steps"] == 2 and len(record["model_sha256"]) == 64


def test_without_another_prompt_there_is_no_part_on_it(explain, tmp_path):
    assert explain("a cell") == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.references) == 5 and "other words change" not in page.text


@pytest.fixture
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "cell <1>.png"
    Image.linear_gradient("L").resize((40, 30)).save(path)
    return path


def test_a_given_image_is_explained_without_drawing(explain, photograph, tmp_path):
    assert explain(HOSTILE, "--image", str(photograph), "--seed", "5") == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.references) == 3 and "A given image" in page.text and "Synthetic" not in page.text
    assert not page.tags & {"script", "b", "link", "iframe"}
    record = json.loads(page.text[page.text.index("{\n") : page.text.rindex("}") + 1])
    assert record["image"] == "cell <1>.png" and record["prompt"] == HOSTILE and record["seed"] == 5
    assert "synthetic" not in record


def test_images_that_cannot_be_explained_say_so(explain, photograph, tiny_stable_diffusion_dir, tmp_path, capsys):
    assert explain("a cell", "--image", "absent.png") == 1
    assert "no file absent.png" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        explain("a cell", "--image", str(photograph), "--instead", "a thing")
    assert "--instead compares drawn images" in capsys.readouterr().err
    assert explain("a cell", "--image", str(photograph), model=tiny_stable_diffusion_dir) == 1
    assert "a VisBioPipeline, not a StableDiffusionPipeline" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prompt", "more", "code", "message"),
    [
        ("a cell", ["--num-seeds", "1"], 2, "--num-seeds must be at least 2"),
        ("a cell", ["--output", "report.png"], 2, "--output report.png must end in .html"),
        ("a cell", ["--device", "abacus"], 2, "'abacus' is none of cpu"),
        ("...", [], 1, "the prompt '...' has no word"),
        ("a cell", ["--instead", "?"], 1, "the prompt '?' has no word"),
        ("a cell", ["--model", "nowhere"], 1, "no model folder nowhere"),
    ],
)
def test_mistakes_are_answered_in_one_line_and_leave_nothing(explain, tmp_path, capsys, prompt, more, code, message):
    try:
        found = explain(prompt, *more)
    except SystemExit as stop:
        found = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visbio: ")]
    assert found == code and len(error) == 1 and message in error[0]
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_explained_say_so(
    explain, tiny_pipeline_dir, tiny_stable_diffusion_dir, tmp_path_factory, capsys
):
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.unet = VisBioUNet.from_config(pipe.unet.config, use_cross_attention=False)
    film = tmp_path_factory.mktemp("film")
    pipe.save_pretrained(film)
    assert explain("a cell", model=film) == 1
    assert "has no cross-attention" in capsys.readouterr().err
    assert explain("a cell", model=tiny_stable_diffusion_dir) == 1
    assert "a VisBioPipeline, not a StableDiffusionPipeline" in capsys.readouterr().err
