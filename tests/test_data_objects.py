"""What counts as an object in a tile, what is measured, and what is said of it."""

import numpy as np
import pytest

from visbio_diffusers.data.objects import Content, Noun, Scene, describe, measure, parse_noun


NUCLEUS = Noun("nucleus", "nuclei")
ONE = Content(1, 0.5, 0.2)


def test_measures_by_hand():
    masks = np.zeros((32, 32), np.uint16)
    masks[2:10, 4:16] = 300
    masks[20:28, 8:14] = masks[20:28, 20:26] = 2  # one object in two pieces
    masks[0, :10] = 5  # below 1 % of the tile
    found, content = measure(masks, 0.01)
    assert content.count == 2 and content.covered == 2 * 96 / 1024
    assert content.diameter == pytest.approx(2 * np.sqrt(96 / np.pi) / 32)
    assert found.dtype == np.uint16 and np.array_equal(found, np.select([masks == 2, masks == 300], [1, 2], 0))
    assert measure(masks, 0.0)[1].count == 3 and measure(masks, 0.1)[1] == Content(0, 0.0, 0.0)
    assert not measure(masks, 0.1)[0].any()


def test_captions_of_what_was_always_known():
    assert describe(ONE, Scene("stained tissue"), NUCLEUS) == "image of stained tissue, one large nucleus, spaced"
    few, many = Content(12, 0.3, 0.1), Content(113, 0.1, 0.5)
    assert describe(few, Scene("fluorescence"), NUCLEUS) == "fluorescence image, twelve medium-sized nuclei, sparse"
    assert describe(many, Scene("bright field"), NUCLEUS) == "bright-field image, 113 small nuclei, crowded"


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene("fluorescence", (("DAPI", "grey"),)), "fluorescence image of DAPI, one large cell, spaced"),
        (Scene("fluorescence", (("DAPI", "blue"),)), "fluorescence image of DAPI in blue, one large cell, spaced"),
        (
            Scene("fluorescence", (("DNA", "blue"), ("actin", "red"), ("DIC", "grey"))),
            "fluorescence image of DNA in blue, actin in red and DIC, one large cell, spaced",
        ),
        (Scene("bright field", (("phase contrast", "grey"),)), "phase contrast image, one large cell, spaced"),
        (Scene("bright field", (("Brightfield", "grey"),)), "bright-field image, one large cell, spaced"),
        (Scene("fluorescence", (), 0.5714, 16.0, 40.0),
         "fluorescence image, one large cell of 8 um, spaced, 40x, 0.57 um per pixel"),
        (Scene("fluorescence", (), 4.0, 400.0),
         "fluorescence image, one large cell of 200 um, spaced, 4 um per pixel"),
    ],
)  # fmt: skip
def test_captions_of_what_the_file_tells(scene, caption):
    assert describe(ONE, scene, Noun("cell", "cells")) == caption


def test_plurals():
    words = {"cell": "cells", "nucleus": "nuclei", "cell nucleus": "cell nuclei", "cell body": "cell bodies"}
    words |= {"spot": "spots", "axis/axes": "axes", "patch": "patches", "bay": "bays"}
    for word, plural in words.items():
        assert parse_noun(word) == (word.partition("/")[0], plural)
    for word in ("", " ", "/cells", "cell/"):
        with pytest.raises(ValueError, match="is no name: give one such as cell"):
            parse_noun(word)
