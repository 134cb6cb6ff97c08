"""Downloads from a server on the loopback that cuts connections, ignores ranges, is busy, or sends the wrong bytes."""

from __future__ import annotations

import hashlib
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from visbio_diffusers.data import download, list_datasets, load_medmnist
from visbio_diffusers.data.download import CHUNK_BYTES, download_file
from visbio_diffusers.data.medmnist import MEDMNIST


ARRAYS = {
    "train_images": np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8),  # some chunks long
    "train_labels": np.array([[0], [1]] * 50, dtype=np.uint8),
}


class FaultyServer(ThreadingHTTPServer):
    """Serves `content` at every path; each entry of `cuts` ends one answer after so many bytes."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.cuts: list[int] = []
        self.honours_range = True
        self.statuses: list[int] = []
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET with the whole content or a range of it."""

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and server.honours_range else 0
        if start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        return None

    def log_message(self, *args) -> None:
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = io.BytesIO()
    np.savez(content, **ARRAYS)
    with FaultyServer(content.getvalue()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_download_continues_after_cut_connections(server, tmp_path):
    server.cuts = [CHUNK_BYTES + 5, 2 * CHUNK_BYTES + 7]
    path = download_file(f"{server.url}/a.npz", tmp_path / "new" / "a.npz", md5(server.content))
    assert path.read_bytes() == server.content
    assert server.ranges == [None, f"bytes={CHUNK_BYTES}-", f"bytes={3 * CHUNK_BYTES}-"]
    download_file(f"{server.url}/a.npz", path, md5(server.content))
    assert len(server.ranges) == 3  # there already
    assert not Path(f"{path}.part").exists()


def test_interrupted_download_is_continued_by_the_next_call(server, tmp_path):
    server.cuts = [CHUNK_BYTES] + [0] * download.ATTEMPTS
    with pytest.raises(OSError, match=rf"continue after {CHUNK_BYTES} bytes of .*a\.npz\.part") as error:
        download_file(f"{server.url}/a.npz", tmp_path / "a.npz", md5(server.content))
    assert "\n" not in str(error.value)
    assert Path(tmp_path / "a.npz.part").read_bytes() == server.content[:CHUNK_BYTES]
    assert not (tmp_path / "a.npz").exists()
    download_file(f"{server.url}/a.npz", tmp_path / "a.npz", md5(server.content))
    assert server.ranges[-1] == f"bytes={CHUNK_BYTES}-"
    assert (tmp_path / "a.npz").read_bytes() == server.content


@pytest.mark.parametrize("part_bytes", [700, None])
def test_download_with_a_server_that_ignores_range_or_a_part_that_is_whole(server, tmp_path, part_bytes):
    server.honours_range = part_bytes is None
    (tmp_path / "a.npz.part").write_bytes(server.content[:part_bytes])
    download_file(f"{server.url}/a.npz", tmp_path / "a.npz", md5(server.content))
    assert (tmp_path / "a.npz").read_bytes() == server.content


def test_wrong_md5_leaves_nothing(server, tmp_path):
    with pytest.raises(OSError, match="MD5"):
        load_medmnist("breastmnist", "train", tmp_path, base_url=server.url)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    (tmp_path / "breastmnist.npz").write_bytes(b"damaged")
    with pytest.raises(OSError, match="delete it"):
        load_medmnist("breastmnist", "train", tmp_path, base_url=server.url)


def test_download_reports_a_missing_file_at_once_and_waits_for_a_busy_server(server, tmp_path):
    server.statuses = [404]
    with pytest.raises(OSError, match="404"):
        download_file(f"{server.url}/a.npz", tmp_path / "a.npz", md5(server.content))
    assert len(server.ranges) == 1
    server.statuses = [503, 429]
    download_file(f"{server.url}/a.npz", tmp_path / "a.npz", md5(server.content))


def test_two_processes_download_once(server, tmp_path):
    arguments = (f"{server.url}/a.npz", tmp_path / "a.npz", md5(server.content))
    threads = [threading.Thread(target=download_file, args=arguments) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.ranges == [None]
    assert (tmp_path / "a.npz").read_bytes() == server.content


def test_downloaded_set_is_loaded(server, tmp_path, monkeypatch):
    small = MEDMNIST["breastmnist"]._replace(md5=("", md5(server.content), "", ""))
    monkeypatch.setitem(MEDMNIST, "breastmnist", small)
    dataset = load_medmnist("breastmnist_64", "train", tmp_path, base_url=server.url)
    assert np.array_equal(dataset.images, ARRAYS["train_images"])
    assert dataset.labels.tolist() == [0, 1] * 50
    assert (dataset.bank, dataset.licence, dataset.name) == ("breastmnist", "CC BY 4.0", "breastmnist_64")
    row = next(row for row in list_datasets(tmp_path) if row["name"] == "breastmnist")
    assert row["downloaded"] == (64,)
