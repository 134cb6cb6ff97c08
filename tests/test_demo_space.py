"""`visbio demo --write-space`: a folder that runs as a Space does, whole or absent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import requests
import yaml
from packaging.requirements import Requirement

from visbio_diffusers.cli import main
from visbio_diffusers.demo.space import write_space


gradio = pytest.importorskip("gradio")


def test_space_serves_its_page_where_it_is_told_to(tiny_pipeline_dir, tmp_path, capsys):
    space = tmp_path / "new" / "space"
    assert main(["demo", "--write-space", str(space), "--model", str(tiny_pipeline_dir)]) == 0
    assert capsys.readouterr().out == f"{space}\n"
    assert [path.name for path in space.parent.iterdir()] == ["space"]
    head = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (head["sdk"], head["sdk_version"], head["app_file"]) == ("gradio", gradio.__version__, "app.py")
    needed = {Requirement(line).name for line in (space / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "gradio"} <= needed and "pytest" not in needed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    settings |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, "app.py"], cwd=space, env={**os.environ, **settings}) as process:
        try:
            page = _page(f"http://127.0.0.1:{port}", process)
            name = tiny_pipeline_dir.name
            assert f"VisBioFusion: {name}" in page and "Which is better?" not in page
            with open("/proc/net/tcp") as table:
                assert any(line.split()[1] == f"00000000:{port:04X}" for line in table.readlines()[1:])
        finally:
            process.terminate()


def _page(url: str, process: subprocess.Popen) -> str:
    while True:
        assert process.poll() is None
        try:
            return requests.get(url, timeout=60).text
        except requests.ConnectionError:
            time.sleep(0.3)


def test_space_of_the_default_model_carries_it_and_its_adapters(tmp_path):
    write_space(tmp_path / "space")
    cards = {path.name for path in (tmp_path / "space" / "visbio_diffusers" / "model_cards").iterdir()}
    assert cards == {"visbio-blood-28", "visbio-align-blood", "visbio-nuclei-lora", "visbio-blood-28-rlsf"}
    with pytest.raises(FileExistsError, match="choose a new folder"):
        write_space(tmp_path / "space")


def test_nothing_remains_of_a_space_that_cannot_be_written(tmp_path, tiny_pipeline_dir):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "weights").symlink_to(tmp_path / "none")
    with pytest.raises(OSError):
        write_space(tmp_path / "space", str(tiny_pipeline_dir), [str(tmp_path / "lora")])
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
