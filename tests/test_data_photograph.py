"""Single images of any origin as 8-bit RGB, and what cannot be read."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from visbio_diffusers.data.photograph import find_images, read_photograph


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def read(path):
    image = read_photograph(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grey_colour_palette_and_transparency(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    assert np.array_equal(read(tmp_path / "grey.png"), RAMP[:, :, None].repeat(3, 2))
    colour = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)
    for name in ("colour.png", "colour.bmp", "colour.tif"):
        Image.fromarray(colour).save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), colour)
    clear = np.dstack([colour, np.where(np.arange(8) < 4, 0, 255)[None].repeat(8, 0).astype(np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read(tmp_path / "clear.png")[:, :4] == 255).all()
    assert np.array_equal(read(tmp_path / "clear.png")[:, 4:], colour[:, 4:])
    Image.fromarray(np.uint8([[0, 255]] * 2)).convert("P").save(tmp_path / "palette.png")
    assert read(tmp_path / "palette.png").tolist() == [[[0] * 3, [255] * 3]] * 2


def test_tiffs_of_other_programs(tmp_path):
    colour = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)
    for compression in ("tiff_lzw", "tiff_deflate"):
        Image.fromarray(colour).save(tmp_path / "packed.tif", compression=compression)
        assert np.array_equal(read(tmp_path / "packed.tif"), colour)
    clear = Image.fromarray(np.dstack([colour, np.zeros((8, 8), np.uint8)]))
    clear.save(tmp_path / "clear.tif")
    assert (read(tmp_path / "clear.tif") == 255).all()
    tifffile.imwrite(tmp_path / "white.tif", RAMP, photometric="miniswhite")
    assert np.array_equal(read(tmp_path / "white.tif")[:, :, 0], 255 - RAMP)
    tifffile.imwrite(tmp_path / "deep.tif", colour.astype(np.uint16) * 100, photometric="rgb")
    assert read(tmp_path / "deep.tif")[:, :, 2].max() == 255


def test_more_bits_are_stretched_whatever_their_range(tmp_path):
    twelve = RAMP.astype(np.uint16) * 16 + 100
    Image.fromarray(twelve).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", twelve)
    tifffile.imwrite(tmp_path / "b.tif", twelve.astype(np.float32) / 7)
    low, high = np.percentile(twelve, (1.0, 99.8))
    expected = (np.clip((twelve - low) / (high - low), 0, 1) * 255).round()
    for name in ("a.png", "a.tif", "b.tif"):
        assert np.abs(read(tmp_path / name)[:, :, 0] - expected).max() <= 1
    tifffile.imwrite(tmp_path / "nan.tif", np.full((4, 4), np.nan, np.float32))
    assert (read(tmp_path / "nan.tif") == 0).all()


def test_channels_stacks_and_series(tmp_path):
    stack = np.stack([RAMP, RAMP[::-1], RAMP.T, RAMP, RAMP])
    tifffile.imwrite(tmp_path / "five.tif", stack, photometric="minisblack")
    assert np.array_equal(read(tmp_path / "five.tif"), stack[:3].transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "two.ome.tif", stack[:2], metadata={"axes": "CYX"}, photometric="minisblack")
    assert np.array_equal(read(tmp_path / "two.ome.tif")[:, :, :2], stack[:2].transpose(1, 2, 0))
    assert (read(tmp_path / "two.ome.tif")[:, :, 2] == 0).all()
    tifffile.imwrite(tmp_path / "z.ome.tif", stack, metadata={"axes": "ZYX"}, photometric="minisblack")
    assert np.array_equal(read(tmp_path / "z.ome.tif")[:, :, 0], stack.max(axis=0))
    series = np.stack([stack[:2], stack[2:4]])
    tifffile.imwrite(tmp_path / "t.ome.tif", series, metadata={"axes": "TCYX"}, photometric="minisblack")
    assert np.array_equal(read(tmp_path / "t.ome.tif")[:, :, 0], RAMP)
    tifffile.imwrite(tmp_path / "many.tif", np.repeat(RAMP[None], 12, axis=0), photometric="minisblack")
    assert np.array_equal(read(tmp_path / "many.tif")[:, :, 1], RAMP)


def test_what_cannot_be_read_is_named(tmp_path):
    for name, content in (("text.png", b"no image"), ("empty.png", b""), ("cut.tif", b"II*\0"), ("empty.tif", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read image .*{name} .*: replace or remove it") as error:
            read_photograph(tmp_path / name)
        assert "\n" not in str(error.value)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot read image .*half.png"):
        read_photograph(tmp_path / "half.png")
    with pytest.raises(FileNotFoundError, match="no file .*gone.png"):
        read_photograph(tmp_path / "gone.png")


def test_images_of_folders(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "a.TIF", "inner/c.jpg", "notes.txt"):
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path / "b.png", tmp_path])]
    assert found == ["b.png", "a.TIF", "b.png", "inner/c.jpg"]
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    assert len(find_images([tmp_path])) == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in .*none"):
        find_images([tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="no file or folder .*gone"):
        find_images([tmp_path / "gone"])
