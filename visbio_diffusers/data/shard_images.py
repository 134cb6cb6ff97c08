"""What lies in shards, as sequences of images, masks and texts that are read when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from visbio_diffusers.data.dataset import UnreadableImage
from visbio_diffusers.data.photograph import UNREADABLE, to_eight_bits
from visbio_diffusers.data.remote import RemoteFiles


if TYPE_CHECKING:
    import pyarrow

OPEN_FILES = 256


@dataclass(frozen=True)
class Shard:
    """One shard: the address of its tar file, that of its index if it has one, and what its manifest says."""

    address: str
    index: str = ""
    num_bytes: int | None = None
    sha256: str = ""
    index_sha256: str = ""


@dataclass(frozen=True)
class Texts(Sequence):
    """A column of texts that stays on disk until it is looked at."""

    column: pyarrow.ChunkedArray

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.column)

    def __getitem__(self, index: int) -> str | None:
        """Return one text."""
        return self.column[int(index)].as_py()

    def __iter__(self) -> Iterator[str | None]:
        """Go through the texts, of one shard after the other."""
        for chunk in self.column.chunks:
            yield from chunk.to_pylist()


@dataclass(frozen=True)
class ShardImages:
    """The images of shards as a sequence of PIL images, each read from its place in its file.

    Args:
        shards (`tuple[Shard, ...]`): the files.
        files (`RemoteFiles`): brings remote ones.
        index (`pyarrow.Table`): `key`, `offset` and `size` of every image.
        starts (`np.ndarray` of shape `(shards,)`): first image of each shard.
        rows (`np.ndarray` of shape `(n,)`, *optional*): of these images only.
    """

    shards: tuple[Shard, ...]
    files: RemoteFiles
    index: pyarrow.Table
    starts: np.ndarray
    rows: np.ndarray | None = None
    opened: dict[int, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.index) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        """Return one decoded image of 8 bits.

        Raises:
            UnreadableImage: if it cannot be read; names shard and sample.
            OSError: if its shard cannot be had.
        """
        data = self.encoded(index)
        try:
            return to_eight_bits(Image.open(io.BytesIO(data)))
        except UNREADABLE as error:
            reason = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise UnreadableImage(f"{self.where(index)} ({reason})") from error

    def encoded(self, index: int) -> bytes:
        """Return the bytes of one image file."""
        row = self._row(index)
        shard = self._shard(row)
        offset, size = self.index["offset"][row].as_py(), self.index["size"][row].as_py()
        file = self._file(shard)
        if hasattr(os, "pread"):  # leaves the position alone, which forked processes share
            return os.pread(file.fileno(), size, offset)
        file.seek(offset)
        return file.read(size)

    def where(self, index: int) -> str:
        """Return the sample of an image and its shard."""
        row = self._row(index)
        shard = self.shards[self._shard(row)]
        return f"sample {self.index['key'][row].as_py()} in {shard.address}"

    def select(self, indices: np.ndarray) -> ShardImages:
        """Return the images at `indices` (int array)."""
        return replace(self, rows=np.asarray(indices) if self.rows is None else self.rows[indices])

    def _row(self, index: int) -> int:
        return int(index) if self.rows is None else int(self.rows[index])

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _file(self, shard: int) -> Any:
        file = self.opened.get(shard)
        if file is None:
            for number, other in list(self.opened.items()):
                if len(self.opened) >= OPEN_FILES or self._is_removed(other):
                    self.opened.pop(number, None)  # closed once no thread reads it
            file = self.opened[shard] = self._open(shard)
        return file

    def _is_removed(self, file: Any) -> bool:
        """Return whether the file has been removed to make room, which it takes until it is closed."""
        return os.fstat(file.fileno()).st_nlink == 0

    def _open(self, shard: int) -> io.BufferedReader:
        return self.files.use(self.shards[shard].address, lambda path: path.open("rb"), self.shards[shard].sha256)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind."""
        return {**self.__dict__, "opened": {}}


class ShardMasks(ShardImages):
    """The masks of shards as a sequence of uint16 arrays."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the masks of one image, uint16 of shape `(height, width)`.

        Raises:
            UnreadableImage: if they cannot be read, or are no masks; names shard and sample.
        """
        try:
            with Image.open(io.BytesIO(self.encoded(index))) as image:
                values = np.asarray(image)
        except UNREADABLE as error:
            raise UnreadableImage(f"masks of {self.where(index)} ({error})") from error
        if values.ndim != 2 or values.dtype.kind not in "iub":
            raise UnreadableImage(f"masks of {self.where(index)} (mode {image.mode} instead of grey integers)")
        return values.astype(np.uint16)
