"""Files that are either whole or absent, their digests, and what the system says of them."""

import codecs
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


PREFIX = ".tmp-"  # of the names of files that are being written


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there is `path` once the block has ended well.

    Folders are made as needed. What stood at `path` before stays if the block fails.

    Raises:
        OSError: naming `path`, if the disk is full or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f"{PREFIX}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}; make room, or choose a place where you may write") from error
    finally:
        temporary.unlink(missing_ok=True)


def digest(*paths: Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of the contents of files, one after the other."""
    found = hashlib.new(algorithm, usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()


def read_utf8(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: if it is in another encoding; names the line.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        code = "UTF-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "ISO-8859-1"
        raise ValueError(
            f"{path} line {line}: byte 0x{content[error.start]:02x} is not UTF-8: save the file in that encoding, or"
            f" convert it, if it is in {code} by: iconv -f {code} -t UTF-8 {path.name} > new{path.suffix}"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line; that of the system with its file first."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
