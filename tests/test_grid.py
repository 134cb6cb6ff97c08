"""Contact sheets and PNG files."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers.grid import GAP, LINE, contact_sheet, data_url, save_png, sheet_of_rows, tint


COLOURS = ["red", "lime", "blue", "yellow", "black"]


def _tiles(count, size=(28, 28)):
    return [Image.new("RGB", size, colour) for colour in COLOURS[:count]]


def test_tiles_stand_in_reading_order():
    sheet = contact_sheet(_tiles(5), ["a cell"] * 5, columns=3, tile=40, caption_lines=1)
    height = 40 + LINE + GAP
    assert sheet.mode == "RGB" and sheet.size == (3 * (40 + GAP), 2 * height)
    for place, colour in enumerate(COLOURS):
        middle = ((place % 3) * (40 + GAP) + GAP // 2 + 20, (place // 3) * height + GAP // 2 + 20)
        assert sheet.getpixel(middle) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert sheet.getpixel((2 * (40 + GAP) + 24, height + 20)) == (255, 255, 255)  # no sixth tile


def test_few_images_make_a_narrow_sheet():
    assert contact_sheet(_tiles(2), ["", ""], columns=8, tile=40).width == 2 * (40 + GAP)


@pytest.mark.parametrize(("size", "shown"), [((28, 28), (40, 40)), ((200, 100), (40, 20)), ((10, 40), (10, 40))])
def test_tiles_keep_their_shape(size, shown):
    sheet = contact_sheet(_tiles(1, size), [""], tile=40, caption_lines=0)
    rows, columns = np.nonzero((np.asarray(sheet) != 255).any(axis=-1))
    assert (columns.max() - columns.min() + 1, rows.max() - rows.min() + 1) == shown


def test_small_images_are_enlarged_without_blur():
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([Image.fromarray(pixels)], [""], tile=40))
    tile = sheet[GAP // 2 : GAP // 2 + 40, GAP // 2 : GAP // 2 + 40]
    assert np.array_equal(tile[5::10, 5::10], pixels)
    assert np.array_equal(tile, pixels.repeat(10, axis=0).repeat(10, axis=1))


def test_rows_have_their_two_sides():
    red, lime, blue = (image.getpixel((0, 0)) for image in _tiles(3))
    rows = [("a band", _tiles(2), _tiles(1)), ("another, longer", _tiles(1), _tiles(3))]
    pixels = np.asarray(sheet_of_rows(rows, ("drawn", "real"), tile=20))
    first, second = pixels[GAP + LINE + 10], pixels[GAP + LINE + 22 + 10]
    assert [np.all(first == colour, axis=1).sum() for colour in (red, lime, blue)] == [40, 20, 0]
    assert [np.all(second == colour, axis=1).sum() for colour in (red, lime, blue)] == [40, 20, 20]
    assert np.flatnonzero(np.all(first == red, axis=1))[20] == np.flatnonzero(np.all(second == red, axis=1))[20]
    assert (pixels[: GAP + LINE] < 128).any() and (pixels[GAP + LINE :, :60] < 128).all(axis=2).any()


def test_grey_images_fit_beside_colour():
    sheet = contact_sheet([Image.new("L", (8, 8), 100)], [""], tile=16)
    assert sheet.getpixel((GAP, GAP)) == (100, 100, 100)


def _ink(caption, lines, tile=80):
    """Return in how many of the caption's lines there is ink, below a white tile."""
    sheet = contact_sheet([Image.new("RGB", (8, 8), "white")], [caption], tile=tile, caption_lines=lines)
    below = np.asarray(sheet)[GAP // 2 + tile :]
    assert (below[lines * LINE :] == 255).all()  # nothing runs over
    return sum((below[line * LINE : (line + 1) * LINE] < 128).any() for line in range(lines))


def test_captions_are_wrapped_and_cut():
    assert _ink("", 3) == 0
    assert _ink("a cell", 3) == 1
    assert _ink("a round lymphocyte with dark nucleus", 4) >= 3
    assert _ink("a round lymphocyte with dark nucleus " * 9, 3) == 3


def test_one_caption_for_each_image():
    with pytest.raises(ValueError, match="zip"):
        contact_sheet(_tiles(3), ["a", "b"])


def test_png_carries_its_metadata(tmp_path):
    path = tmp_path / "new" / "cell.png"
    image = _tiles(1)[0]
    save_png(image, path, {"prompt": "a cell, 5 \u00b5m", "seed": "7"})
    with Image.open(path) as read:
        assert read.text == {"prompt": "a cell, 5 \u00b5m", "seed": "7"}
        assert np.array_equal(np.asarray(read), np.asarray(image))
    save_png(_tiles(2)[1], path)
    assert Image.open(path).getpixel((0, 0)) == (0, 255, 0)
    assert [entry.name for entry in path.parent.iterdir()] == ["cell.png"]


def test_no_half_picture_remains(tmp_path):
    """A picture that cannot be encoded leaves the old file whole and no other."""
    path = tmp_path / "cell.png"
    save_png(_tiles(1)[0], path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("HSV", (4, 4)), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["cell.png"]


def test_target_that_is_a_folder_says_so(tmp_path):
    with pytest.raises(OSError, match="cell.png"):
        (tmp_path / "cell.png").mkdir()
        save_png(_tiles(1)[0], tmp_path / "cell.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["cell.png"]


def test_tint_is_red_above_zero_blue_below_and_grey_at_zero():
    shown = np.asarray(tint(Image.new("RGB", (3, 1), (100, 100, 100)), np.array([[1.0, 0.0, -1.0]])), int)[0]
    assert shown[0, 0] > 150 > shown[0, 2] and shown[2, 2] > 150 > shown[2, 0]
    assert (shown[1] == 100).all()


def test_data_url_holds_the_picture():
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    kind, content = data_url(Image.fromarray(pixels)).split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), pixels)
