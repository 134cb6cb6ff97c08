"""Download of one large file: resumable, checked, and atomic."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import requests
from filelock import FileLock
from tqdm.auto import tqdm

from visbio_diffusers.files import digest


logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**14  # what has come of a chunk is lost when a connection is cut
TIMEOUT_SECONDS = 60
ATTEMPTS = 4  # in a row without a single new byte
BACKOFF_SECONDS = 0.5  # before the second of these, doubled each time


def download_file(url: str, path: str | Path, md5: str) -> Path:
    """Return `path` after making sure that it holds the file of `url`.

    Bytes arrive in `<path>.part`, which a later call continues after an interruption, and become `path` once their MD5
    is right. A file that is already there is checked once; `<path>.md5` remembers that it was.

    Args:
        url (`str`): address of the file.
        path (`str` or `Path`): where it shall lie; folders are made.
        md5 (`str`): expected MD5, hexadecimal.

    Raises:
        OSError: if the server cannot be reached, the connection breaks off for good, the disk is too small, or the
            MD5 is wrong.
    """
    path = Path(path)
    if _is_remembered(path, md5):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # the processes of one training must not write into one part
        if path.exists():
            _check_existing(path, md5)
            return path
        part = Path(f"{path}.part")
        fetch(url, part)
        found = digest(part, algorithm="md5")
        if found != md5:
            part.unlink()
            raise OSError(f"{url} has MD5 {found} instead of {md5}: the download was removed, try again")
        os.replace(part, path)
        _remember(path, md5)
    return path


def fetch(url: str, part: Path, show: bool = True, attempts: int = ATTEMPTS) -> None:
    """Append the missing bytes of a file to `part`, reconnecting as long as each connection brings some.

    Raises:
        OSError: if it cannot be had, or the disk is too small.
    """
    failures = 0
    while True:
        size_before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_once(url, part, size_before, show):
                return
            reason = "the connection was cut"
        except requests.HTTPError as error:
            if error.response.status_code < 500 and error.response.status_code != 429:
                raise OSError(f"cannot download {url}: {error}") from error
            reason = str(error)
        except requests.RequestException as error:
            reason = type(error).__name__  # the text of these is long
            logger.debug("%s", error)
        size = part.stat().st_size if part.exists() else 0
        failures = 0 if size > size_before else failures + 1
        if failures == attempts:
            raise OSError(
                f"cannot download {url} ({reason}): run the same command to continue after {size} bytes of {part},"
                f" or put the file at {part.with_suffix('')} yourself"
            )
        if failures:
            time.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))
        logger.warning("download of %s: %s after %d bytes, reconnecting", url, reason, size)


def _fetch_once(url: str, part: Path, offset: int, show: bool) -> bool:
    """Read one response into `part`; return whether the file is complete."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == 416:  # nothing lies behind `offset`: the part is whole, or of another file
            return True
        response.raise_for_status()
        resumed = response.status_code == 206
        offset = offset if resumed else 0
        missing = int(response.headers.get("Content-Length", 0))
        free = shutil.disk_usage(part.parent).free
        if missing > free:
            raise OSError(
                f"{url} needs {missing} bytes, {part.parent} has {free} free: set VISBIO_CACHE to a larger disk"
            )
        total, quiet = offset + missing or None, not show
        bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=quiet)
        with bar, part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            return not missing or file.tell() == offset + missing


def _check_existing(path: Path, md5: str) -> None:
    found = digest(path, algorithm="md5")
    if found != md5:
        raise OSError(f"{path} has MD5 {found} instead of {md5}: delete it to download it again")
    _remember(path, md5)


def _note(path: Path) -> Path:
    return Path(f"{path}.md5")


def _is_remembered(path: Path, md5: str) -> bool:
    return path.exists() and _note(path).exists() and _note(path).read_text(encoding="utf-8") == _stamp(path, md5)


def _stamp(path: Path, md5: str) -> str:
    status = path.stat()
    return f"{md5} {status.st_size} {status.st_mtime_ns}\n"


def _remember(path: Path, md5: str) -> None:
    _note(path).write_text(_stamp(path, md5), encoding="utf-8")
