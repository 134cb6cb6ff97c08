"""Files that lie elsewhere, brought here when they are needed, and the oldest of them removed to make room."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from visbio_diffusers.data.download import fetch
from visbio_diffusers.files import PREFIX, digest, one_line, whole_file


logger = logging.getLogger(__name__)

PIPE = "pipe:"
LIMIT_VARIABLE = "VISBIO_CACHE_GB"


class RemoteFiles:
    """A folder with copies of remote files, of which those used longest ago are removed beyond `VISBIO_CACHE_GB`.

    Args:
        folder (`Path`): where the copies lie; processes may share it.
        allow_pipe (`bool`): whether `pipe:COMMAND` may run a shell, whose output is the file.
    """

    def __init__(self, folder: Path, allow_pipe: bool = False):
        """Read the limit, by default that there is none."""
        self.folder = folder
        self.allow_pipe = allow_pipe
        self.limit = float(os.environ.get(LIMIT_VARIABLE, "inf")) * 2**30

    def local(self, url: str, sha256: str = "") -> Path:
        """Return the copy of a file, which is brought here if it is not; other addresses than URLs are paths.

        Raises:
            ValueError: for `pipe:` without permission.
            OSError: if the file cannot be had, or has another SHA-256 than it should.
        """
        if not is_remote(url):
            return Path(url)
        if url.startswith(PIPE) and not self.allow_pipe:
            raise ValueError(f"{url} would run a shell on this machine: allow it with --allow_pipe if you trust it")
        path = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{_base_name(url)}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    self._bring(url, path, sha256)
        os.utime(path)
        return path

    def converted(self, url: str, suffix: str, convert: Callable[[Path, Path], None]) -> Path:
        """Return a file that `convert(source, target)` has made of a file; a remote source is not kept beside it.

        Raises:
            OSError: as `local`, and if there is no such file here.
        """
        mark = url
        if not is_remote(url):
            status = Path(url).stat()
            mark = f"{Path(url).resolve()} {status.st_size} {status.st_mtime_ns}"
        path = self.folder / f"{hashlib.sha256(mark.encode()).hexdigest()[:16]}{suffix}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    source = self.local(url)
                    with whole_file(path) as temporary:
                        convert(source, temporary)
                        self._make_room(temporary.stat().st_size)
                    if is_remote(url):
                        source.unlink(missing_ok=True)
        os.utime(path)
        return path

    def _bring(self, url: str, path: Path, sha256: str) -> None:
        part = Path(f"{path}.part")
        if url.startswith(PIPE):
            with part.open("wb") as file:
                done = subprocess.run(url.removeprefix(PIPE), shell=True, stdout=file, stderr=subprocess.PIPE)
            if done.returncode:
                part.unlink()
                said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
                raise OSError(f"{url} ended with code {done.returncode}: {''.join(said)}")
        elif url.startswith(("https:", "http:")):
            fetch(url, part, show=False)
        else:
            _fetch_filesystem(url, part)
        if sha256 and digest(part) != sha256:
            part.unlink()
            raise OSError(f"{url} has another SHA-256 than its manifest says: it was removed, try again")
        self._make_room(part.stat().st_size)
        os.replace(part, path)

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago; who has one open can still read it."""
        kept = [
            path
            for path in self.folder.iterdir()
            if path.suffix not in (".lock", ".part") and not path.name.startswith(PREFIX)
        ]
        kept.sort(key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in kept) + size
        while kept and total > self.limit:
            total -= kept[0].stat().st_size
            kept.pop(0).unlink(missing_ok=True)


def is_remote(address: str) -> bool:
    """Return whether an address is a URL or a `pipe:`, and no path."""
    return address.startswith(PIPE) or "://" in address


def _base_name(url: str) -> str:
    if url.startswith(PIPE):
        return "pipe.tar"
    return Path(urlsplit(url).path).name or "file"


def _fetch_filesystem(url: str, part: Path) -> None:
    """Fetch from what fsspec knows: hf://datasets/OWNER/NAME/FILE, s3://, gs:// and others."""
    import fsspec

    try:
        filesystem, place = fsspec.core.url_to_fs(url)
        filesystem.get_file(place, str(part))
    except (OSError, ValueError, ImportError) as error:
        raise OSError(f"cannot fetch {url}: {one_line(error)}") from error
