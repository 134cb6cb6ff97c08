"""Channels as colours: which, how bright, and what kind of image they make."""

import numpy as np
import pytest

from visbio_diffusers.data.channels import choose_colours, choose_look
from visbio_diffusers.data.micrograph import Micrograph


RNG = np.random.default_rng(0)
SPOTS = (RNG.random((40, 40, 5)) < 0.1) * RNG.integers(500, 3000, (40, 40, 5))


def of(values, *names):
    return Micrograph(values, names or ("",) * values.shape[2])


def stretched(plane):
    low, high = np.percentile(plane, (1.0, 99.8))
    return np.clip((plane - low) / (high - low), 0, 1) * 255


@pytest.mark.parametrize(
    ("names", "colours"),
    [
        ("nucleus|cytoplasm", "blue green"),
        ("cytoplasm|nucleus", "green blue"),
        ("||", "red green blue"),
        ("|", "red green"),
        ("DAPI|FITC|TRITC|Cy5|phase contrast", "blue green red magenta grey"),
        ("DAPI|GFP|mCherry|Alexa 647", "blue green red magenta"),
        ("DAPI|histone H3|actin", "blue red green"),
        ("DIC|bright field|x", "grey grey red"),
        ("||||", "red green blue magenta cyan"),
        ("DAPI", "grey"),
    ],
)
def test_colours_by_name(names, colours):
    assert choose_colours(names.split("|")) == tuple(colours.split())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_each_channel_is_stretched_by_itself_and_added_in_its_colour(dtype):
    values = (SPOTS[:, :, :2] // 12 if dtype == np.uint8 else SPOTS[:, :, :2]).astype(dtype)
    look = choose_look(of(values, "DAPI", "GFP"))
    rgb = look.to_rgb(values).astype(int)
    assert look.stain == "fluorescence" and (rgb[:, :, 0] == 0).all()
    for place, plane in ((2, values[:, :, 0]), (1, values[:, :, 1])):
        assert np.abs(rgb[:, :, place] - stretched(plane.astype(float))).max() <= 1
    far_red = choose_look(of(values, "DAPI", "Cy5")).to_rgb(values).astype(int)  # blue and magenta share a colour
    both = np.minimum(stretched(values[:, :, 0].astype(float)) + stretched(values[:, :, 1].astype(float)), 255)
    assert np.abs(far_red[:, :, 2] - both).max() <= 1


def test_names_of_the_user_come_before_those_of_the_file():
    image = of(SPOTS[:, :, :3].astype(np.uint16), "x", "y", "z")
    look = choose_look(image, ["none", "cytoplasm", "nucleus"])
    assert look.names == ("cytoplasm", "nucleus") and look.shown == (1, 2) and look.colours == ("green", "blue")
    rgb = look.to_rgb(image.values)
    assert (rgb[:, :, 0] == 0).all() and np.abs(rgb[:, :, 2] - stretched(image.values[:, :, 2])).max() <= 1
    with pytest.raises(ValueError, match=r"has not 2 channels \(a, b\) but 3: name each"):
        choose_look(image, ["a", "b"])
    with pytest.raises(ValueError, match="has no channel that is not left out"):
        choose_look(image, ["none"] * 3)


def test_photographs_in_colour():
    purple = np.full((8, 8, 3), (150, 90, 170), np.uint8)
    look = choose_look(of(purple))
    assert look.stain == "stained tissue" and np.array_equal(look.to_rgb(purple), purple)
    deep = choose_look(of(purple.astype(np.uint16) * 200))  # 16 bits: the hue stays
    shown = deep.to_rgb(purple.astype(np.uint16) * 200)[0, 0].astype(float)
    assert deep.stain == "stained tissue" and np.allclose(shown / shown[2], [150 / 170, 90 / 170, 1], atol=0.01)
    composite = (SPOTS[:, :, :3] // 12).astype(np.uint8) * np.array([0, 1, 1], np.uint8)  # as in Cellpose's own data
    look = choose_look(of(composite))
    assert look.stain == "fluorescence" and look.colours == ("red", "green", "blue")
    assert (look.to_rgb(composite)[:, :, 0] == 0).all() and look.to_rgb(composite)[:, :, 1:].max() == 255
    sparse = np.where(np.arange(40)[:, None, None] < 1, composite, 0)  # a few coloured cells make no grey photograph
    assert choose_look(of(sparse)).colours == ("red", "green", "blue")
    grey = np.repeat((SPOTS[:, :, :1] // 12).astype(np.uint8), 3, axis=2)
    look = choose_look(of(grey), ["DAPI"])
    assert look.names == ("DAPI",) and look.colours == ("grey",)
    assert np.abs(look.to_rgb(grey)[:, :, 0] - stretched(grey[:, :, 0].astype(float))).max() <= 1


def test_kind_of_a_single_channel():
    dark, bright = (values.astype(np.uint16) for values in (SPOTS[:, :, :1], 4000 - SPOTS[:, :, :1]))
    assert choose_look(of(dark)).stain == "fluorescence" and choose_look(of(bright)).stain == "bright field"
    assert choose_look(of(bright, "GFP")).stain == "fluorescence"
    assert choose_look(of(dark, "phase contrast")).stain == "bright field"
    assert choose_look(of(np.zeros((4, 4, 3), np.uint8))).to_rgb(np.zeros((4, 4, 3), np.uint8)).max() == 0


def test_large_images_are_judged_by_a_sample(monkeypatch):
    values = RNG.normal(1000, 100, (400, 400, 1)).astype(np.float32)
    whole = choose_look(of(values))
    monkeypatch.setattr("visbio_diffusers.data.channels.SAMPLE", 10000)
    sampled = choose_look(of(values))
    assert sampled.low != whole.low
    assert abs(sampled.low - whole.low) < 20 and abs(sampled.high - whole.high) < 50


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(channels, value):
    values = SPOTS[:, :, :channels].astype(np.float32)
    look = choose_look(of(values))
    values[3, 5] = value
    for refuse in (lambda: choose_look(of(values)), lambda: look.to_rgb(values)):
        with pytest.raises(ValueError, match="has values that are not finite"), np.errstate(all="ignore"):
            refuse()
