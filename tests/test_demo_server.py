"""`visbio demo` as its visitors meet it: in a browser, over its API, and by those who try what they should not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from visbio_diffusers.cli import main
from visbio_diffusers.preferences import load_preferences


pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[1]


class Served:
    """A running `visbio demo`: its address, its votes, and what its API answers."""

    def __init__(self, url: str, votes: Path):
        self.url, self.votes = url, votes
        self.port = url.split(":")[-1]

    def ask(self, name: str, *data) -> tuple[str, object]:
        """Return the last event of a call, "complete" or "error", and what came with it."""
        given = requests.post(f"{self.url}/gradio_api/call/{name}", json={"data": data}, timeout=60)
        if given.status_code != 200:
            return "error", given.text
        place = f"{self.url}/gradio_api/call/{name}/{given.json()['event_id']}"
        event, content = requests.get(place, timeout=120).text.strip().split("\n\n")[-1].split("\n", 1)
        return event.removeprefix("event: "), json.loads(content.removeprefix("data: "))

    def upload(self, file: Path) -> dict:
        """Return what stands for an uploaded file in a call."""
        with file.open("rb") as stream:
            answer = requests.post(f"{self.url}/gradio_api/upload", files={"files": stream}, timeout=60)
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def served(tiny_pipeline_dir, tmp_path_factory):
    votes = tmp_path_factory.mktemp("votes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["demo", "--model", str(tiny_pipeline_dir), "--device", "cpu"]
    command += ["--port", str(port), "--votes", str(votes)]
    process = get_context("fork").Process(target=_serve, args=[command, votes / "asked"], daemon=True)
    process.start()
    url = f"http://127.0.0.1:{port}"
    while not _answers(url):
        assert process.is_alive()
        time.sleep(0.2)
    yield Served(url, votes)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0
    assert not (votes / "asked").exists()


def _serve(command: list[str], asked: Path) -> None:
    """Serve, and write down which hosts are looked up."""
    look_up = socket.getaddrinfo

    def watched(host, *arguments, **options):
        if host not in ("127.0.0.1", "localhost", None):
            asked.write_text(str(host))
        return look_up(host, *arguments, **options)

    socket.getaddrinfo = watched
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which those who start tests may have switched off
    sys.exit(main(command))


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=60).status_code == 200
    except requests.ConnectionError:
        return False


@pytest.fixture(scope="module")
def files(tmp_path_factory, visbio_data):
    """A real cell, a text that is called PNG, an image that is too large."""
    folder = tmp_path_factory.mktemp("files")
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        Image.fromarray(real["test_images"][3]).save(folder / "cell.png")
    (folder / "text.png").write_text("no image")
    Image.new("L", (10_000, 10_000)).save(folder / "large.png")
    return folder


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../../../etc/passwd", "visbio_diffusers/cli.py", str(ROOT / "README.md"), "VOTES"]
)
def test_no_file_of_the_machine_is_served(served, place):
    (served.votes / "secret.txt").write_text("secret")
    place = place.replace("VOTES", str(served.votes / "secret.txt"))
    for form in (f"/gradio_api/file={place}", f"/file={place}", f"/gradio_api/file={place.replace('/', '%2F')}"):
        address = requests.Request("GET", served.url).prepare()
        address.url = served.url + form  # as it stands, without tidying of ".."
        assert requests.Session().send(address, timeout=60).status_code in (403, 404)


def test_forged_uploads_and_numbers_out_of_range_are_refused(served, files):
    for path in ("/etc/passwd", "../../../../etc/passwd", str(files / "cell.png"), "https://example.org/a.png"):
        event, content = served.ask("describe", {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert event == "error" and "root:" not in str(content)
    fair = ["a cell", 1, 0, 1, 1.35, "DDIM", "none", 1, False, False]
    assert served.ask("draw", *fair)[0] == "complete"
    for place, value in (
        (1, 9),
        (1, 0.5),
        (2, -1),
        (3, 10**6),
        (3, "many"),
        (4, 1e9),
        (5, "Magic"),
        (6, "/etc"),
        (7, 9),
    ):
        event, _ = served.ask("draw", *fair[:place], value, *fair[place + 1 :])
        assert event == "error", (place, value)
    for prompt in (" ", "x" * 100_000, None):
        assert served.ask("draw", prompt, *fair[1:])[0] == "error"
    assert served.ask("vote_left", "me")[0] == "error"  # on nothing
    assert served.ask("draw", *fair)[0] == "complete"


def test_an_upload_beyond_the_limit_is_refused(served, tmp_path):
    (tmp_path / "much.png").write_bytes(bytes(21 * 2**20))
    with (tmp_path / "much.png").open("rb") as stream:
        answer = requests.post(f"{served.url}/gradio_api/upload", files={"files": stream}, timeout=60)
    assert answer.status_code == 413


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_visitor_draws_votes_describes_and_edits(served, files):
    elsewhere = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        own = (served.url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
        page.goto(served.url)
        _draw(page, served)
        _vote(page, served)
        _describe(page, files)
        _edit(page, files)
        browser.close()
    assert elsewhere == []


def _open(page, tab: str):
    page.get_by_role("tab", name=tab).click()
    return page.locator("[role=tabpanel]:visible")


def _draw(page, served):
    panel = page.locator("[role=tabpanel]:visible")
    page.get_by_text("not for clinical use").wait_for()
    panel.get_by_label("Prompt").fill("a cell, " + "very " * 60 + "round")
    panel.get_by_label("First seed").fill("7")
    panel.get_by_label("Show where each word was read").check()
    panel.get_by_role("button", name="Draw", exact=True).click()
    panel.locator(".pixels img").nth(3).wait_for()
    page.get_by_text("this end of the prompt is cut off").wait_for()
    assert "seed 10" in panel.inner_text() and "DDIMScheduler" in panel.inner_text()
    content = requests.get(panel.locator(".pixels img").first.get_attribute("src"), stream=True, timeout=60).raw
    with Image.open(content) as image:
        assert image.size == (8, 8) and image.text["seed"] == "7" and image.text["synthetic"] == "true"
        assert len(image.text["model_sha256"]) == 64
    assert panel.locator("img").evaluate_all("all => Math.max(...all.map(each => each.naturalWidth))") > 400  # maps
    style = panel.locator(".pixels img").first.evaluate("each => getComputedStyle(each).imageRendering")
    assert style == "pixelated"


def _vote(page, served):
    panel = _open(page, "Which is better?")
    panel.get_by_role("button", name="Left is better").click()
    page.get_by_text("draw a pair first").wait_for()
    panel.get_by_label("Nickname (may be empty)").fill("Ada")
    panel.get_by_role("button", name="Draw a pair").click()
    panel.locator(".pixels img").nth(1).wait_for()
    sources = [panel.locator(".pixels img").nth(side).get_attribute("src") for side in (0, 1)]
    left, right = (requests.get(source, timeout=60).content for source in sources)
    panel.get_by_role("button", name="Right is better").click()
    page.get_by_text("your vote is kept").wait_for()
    (line,) = (served.votes / "pairs.jsonl").read_text().splitlines()
    pair = json.loads(line)
    assert (served.votes / pair["image_w"]).read_bytes() == right
    assert (served.votes / pair["image_l"]).read_bytes() == left
    assert (pair["prompt"], pair["who"]) == ("a cell", "Ada") and re.fullmatch(r"20.*\+00:00", pair["when"])
    found = load_preferences(served.votes / "pairs.jsonl", 8)
    assert found.prompts == ["a cell"] and not np.array_equal(found.better, found.worse)
    panel.locator(".pixels img").nth(1).wait_for()  # the next pair
    assert panel.locator(".pixels img").first.get_attribute("src") not in sources
    panel.get_by_role("button", name="Skip").click()
    page.get_by_text("nothing is kept").wait_for()
    assert len((served.votes / "pairs.jsonl").read_text().splitlines()) == 1


def _describe(page, files):
    panel = _open(page, "Describe")
    for name, said in (("text.png", "cannot read image text.png"), ("large.png", "10000 x 10000 pixels are more")):
        panel.locator("input[type=file]").set_input_files(files / name)
        panel.get_by_text(name).first.wait_for()
        panel.get_by_role("button", name="Describe", exact=True).click()
        page.get_by_text(said).first.wait_for()
        panel.locator(".upload").get_by_label("Clear").click()
    panel.locator("input[type=file]").set_input_files(files / "cell.png")
    panel.get_by_text("cell.png").first.wait_for()
    panel.get_by_role("button", name="Describe", exact=True).click()
    panel.get_by_role("heading", name="a microscopy image of a monocyte").wait_for()


def _edit(page, files):
    panel = _open(page, "Draw again and edit")
    panel.get_by_role("button", name="Draw again", exact=True).click()
    page.get_by_text("there is no image yet").first.wait_for()
    panel.locator("input[type=file]").set_input_files(files / "cell.png")
    panel.get_by_text("cell.png").first.wait_for()
    panel.get_by_label("It is to show").fill("dust")
    panel.get_by_role("button", name="Edit", exact=True).click()
    panel.get_by_text("how far to trust the edit").wait_for()
    with Image.open(requests.get(panel.locator(".pixels img").first.get_attribute("src"), stream=True).raw) as image:
        assert image.size == (24, 8) and image.text["prompt"] == "dust" and image.text["image_sha256"]


def test_a_port_that_is_taken_is_answered_in_one_line(served, tiny_pipeline_dir, tmp_path, capsys):
    flags = ["--port", served.port, "--device", "cpu", "--votes", str(tmp_path)]
    assert main(["demo", "--model", str(tiny_pipeline_dir), *flags]) == 1
    assert capsys.readouterr().err.endswith(
        f"cannot listen at 127.0.0.1:{served.port}, which is taken, or not this machine's\n"
    )
