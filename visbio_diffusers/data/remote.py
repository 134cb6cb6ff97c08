"""Files that lie elsewhere, brought here when they are needed, and the oldest of them removed to make room."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from filelock import FileLock

from visbio_diffusers.data.download import fetch
from visbio_diffusers.files import PREFIX, digest, one_line, whole_file


logger = logging.getLogger(__name__)

PIPE = "pipe:"
LIMIT_VARIABLE = "VISBIO_CACHE_GB"
ATTEMPTS = 8  # two minutes without a byte end a download

Found = TypeVar("Found")


class RemoteFiles:
    """A folder with copies of remote files, of which those used longest ago are removed beyond `VISBIO_CACHE_GB`.

    Args:
        folder (`Path`): where the copies lie; processes may share it.
        allow_pipe (`bool`): whether `pipe:COMMAND` may run a shell, whose output is the file.

    Raises:
        ValueError: if `VISBIO_CACHE_GB` is no number.
    """

    def __init__(self, folder: Path, allow_pipe: bool = False):
        """Read the limit, by default that there is none."""
        self.folder = folder
        self.allow_pipe = allow_pipe
        given = os.environ.get(LIMIT_VARIABLE, "inf")
        try:
            self.limit = float(given) * 2**30
        except ValueError as error:
            raise ValueError(f"{LIMIT_VARIABLE}={given} is no number of gigabytes, such as 50") from error

    def use(self, url: str, function: Callable[[Path], Found], sha256: str = "") -> Found:
        """Return `function(path)` of a file, which is brought here if it is not; other addresses than URLs are paths.

        What another process removes between the two is brought again.

        Raises:
            ValueError: for `pipe:` without permission.
            OSError: if the file cannot be had, or has another SHA-256 than it should.
        """
        if not is_remote(url):
            return function(Path(url))
        return self._use(self._path(f"{url} {sha256}", f"-{_base_name(url)}"), function, self._bring, url, sha256)

    def use_converted(
        self, url: str, suffix: str, convert: Callable[[Path, Path], None], function: Callable[[Path], Found]
    ) -> Found:
        """Return `function(path)` of what `convert(source, target)` makes of a file; a remote one is not kept.

        Raises:
            OSError: as `use`, and if there is no such file here.
        """
        mark = url
        if not is_remote(url):
            status = Path(url).stat()
            mark = f"{Path(url).resolve()} {status.st_size} {status.st_mtime_ns}"
        return self._use(self._path(mark, suffix), function, self._convert, url, convert)

    def fresh(self, url: str) -> bytes:
        """Return what a small file holds now, or where its server cannot be reached, what it held last.

        Raises:
            ValueError: for `pipe:`.
            OSError: if it cannot be had.
        """
        if not is_remote(url):
            return Path(url).read_bytes()
        if url.startswith(PIPE):
            raise ValueError(f"{url} would be read through a shell, and what it names too: give the tar files instead")
        path = self._path(url, f"-{_base_name(url)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            part = Path(f"{path}.part")
            part.unlink(missing_ok=True)
            try:
                fetch_any(url, part, 2)
                os.replace(part, path)
            except OSError:
                if not path.exists():
                    raise
                logger.warning("%s cannot be reached: its last copy is used", url)
            return path.read_bytes()

    def forget(self, url: str) -> None:
        """Remove the copy of a file that turned out to be damaged."""
        if is_remote(url):
            self._path(f"{url} ", f"-{_base_name(url)}").unlink(missing_ok=True)

    def _path(self, mark: str, suffix: str) -> Path:
        return self.folder / f"{hashlib.sha256(mark.encode()).hexdigest()[:16]}{suffix}"

    def _use(self, path: Path, function: Callable[[Path], Found], bring: Callable[..., None], *arguments) -> Found:
        while True:
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{path}.lock"):
                    if not path.exists():
                        bring(path, *arguments)
            try:
                os.utime(path)
                return function(path)
            except FileNotFoundError:
                if path.exists():
                    raise

    def _bring(self, path: Path, url: str, sha256: str) -> None:
        part = Path(f"{path}.part")
        if url.startswith(PIPE):
            self._run(url, part)
        else:
            fetch_any(url, part, ATTEMPTS)
        if sha256 and digest(part) != sha256:
            part.unlink()
            raise OSError(f"{url} has another SHA-256 than its manifest says: it was removed, try again")
        self._make_room(part.stat().st_size)
        os.replace(part, path)

    def _run(self, url: str, part: Path) -> None:
        if not self.allow_pipe:
            raise ValueError(f"{url} would run a shell on this machine: allow it with --allow_pipe if you trust it")
        with part.open("wb") as file:
            done = subprocess.run(url.removeprefix(PIPE), shell=True, stdout=file, stderr=subprocess.PIPE)
        if done.returncode:
            part.unlink()
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"{url} ended with code {done.returncode}: {''.join(said)}")

    def _convert(self, path: Path, url: str, convert: Callable[[Path, Path], None]) -> None:
        def write(source: Path) -> None:
            with whole_file(path) as temporary:
                convert(source, temporary)
                self._make_room(temporary.stat().st_size)

        self.use(url, write)
        self.forget(url)

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago; who has one open can still read it."""
        if self.limit == float("inf"):
            return
        with FileLock(self.folder / ".lock"):
            kept = [path for path in self.folder.iterdir() if path.suffix not in (".lock", ".part", "")]
            found = []
            for path in kept:
                if not path.name.startswith(PREFIX) and path.exists():
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
            total = sum(each for _, each, _ in found) + size
            for _, each, path in sorted(found):
                if total > self.limit:
                    total -= each
                    path.unlink(missing_ok=True)


def is_remote(address: str) -> bool:
    """Return whether an address is a URL or a `pipe:`, and no path."""
    return address.startswith(PIPE) or "://" in address


def fetch_any(url: str, part: Path, attempts: int) -> None:
    """Fetch from a web server, or from what fsspec knows: hf://datasets/OWNER/NAME/FILE, s3://, gs:// and others."""
    if url.startswith(("https:", "http:")):
        fetch(url, part, show=False, attempts=attempts)
        return
    import fsspec

    try:
        filesystem, place = fsspec.core.url_to_fs(url)
        filesystem.get_file(place, str(part))
    except (OSError, ValueError, ImportError) as error:
        raise OSError(f"cannot fetch {url}: {one_line(error)}") from error


def _base_name(url: str) -> str:
    if url.startswith(PIPE):
        return "pipe.tar"
    return Path(urlsplit(url).path).name or "file"
