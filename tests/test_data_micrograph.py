"""What is read of the files of microscopes: values, channels, names, sizes; and what is refused."""

import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from visbio_diffusers.data import micrograph
from visbio_diffusers.data.micrograph import read_masks, read_micrograph


PLANES = np.random.default_rng(0).integers(0, 4000, (5, 24, 32)).astype(np.uint16)
OBJECTIVE = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Instrument ID="Instrument:0">
<Objective ID="Objective:0" NominalMagnification="63"/><Objective ID="Objective:1" NominalMagnification="20.0"/>
</Instrument><Image ID="Image:0"><ObjectiveSettings ID="Objective:1"/>
<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="32" SizeY="24" SizeC="1" SizeZ="1" SizeT="1"
PhysicalSizeX="325" PhysicalSizeXUnit="nm" PhysicalSizeY="325" PhysicalSizeYUnit="nm">
<Channel ID="Channel:0:0" Fluor="Hoechst" SamplesPerPixel="1"/><TiffData IFD="0"/></Pixels></Image></OME>"""


def write_ome(path, planes, names, **metadata):
    metadata = {"axes": "CYX", "Channel": {"Name": names}, **metadata}
    tifffile.imwrite(path, planes, photometric="minisblack", metadata=metadata)


def test_ome_tiff_tells_names_and_size_of_pixels(tmp_path):
    path = tmp_path / "a.ome.tif"
    units = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    write_ome(path, PLANES[:3], ["DAPI", "Channel 1", "C:1"], PhysicalSizeX=0.25, PhysicalSizeY=0.25, **units)
    read = read_micrograph(path)
    assert np.array_equal(read.values, PLANES[:3].transpose(1, 2, 0)) and isinstance(read.values, np.memmap)
    assert read[1:] == (("DAPI", "", ""), 0.25, None)
    write_ome(path, PLANES[:2], ["DAPI", "488 nm"], PhysicalSizeX=0.25, PhysicalSizeY=0.5, **units)
    assert read_micrograph(path)[1:] == (("DAPI", "488 nm"), None, None)  # pixels that are not square
    tifffile.imwrite(path, PLANES[0], description=OBJECTIVE, metadata=None)
    assert read_micrograph(path)[1:] == (("Hoechst",), pytest.approx(0.325), 20.0)
    tifffile.imwrite(path, PLANES[0], description=OBJECTIVE.replace("</Pixels>", ""), metadata=None)
    assert read_micrograph(path)[1:] == (("",), None, None)


def test_imagej_and_resolution_tags(tmp_path):
    path = tmp_path / "a.tif"
    for unit, size in (("micron", 0.25), ("um", 0.25), (r"\u00B5m", 0.25), ("nm", None), ("pixel", None)):
        facts = {"axes": "CYX", "unit": unit, "Labels": ["DAPI", "c:2/2 - x.tif"]}
        tifffile.imwrite(path, PLANES[:2], imagej=True, metadata=facts, resolution=(4, 4))
        assert read_micrograph(path)[1:] == (("DAPI", ""), size, None), unit
    for resolution, unit, size in (
        ((40000, 40000), "centimeter", 0.25), ((25400, 25400), "inch", 1.0), ((300, 300), "inch", None),
        ((40000, 30000), "centimeter", None), ((40000, 40000), "none", None),
    ):  # fmt: skip
        tifffile.imwrite(path, PLANES[0], resolution=resolution, resolutionunit=unit)
        assert read_micrograph(path).pixel_size == (size and pytest.approx(size)), (resolution, unit)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_channels_lie_wherever_they_are_fewest(tmp_path, compression):
    path = tmp_path / "a.tif"
    for planes in (PLANES[:2], PLANES):
        for stored in (planes, planes.transpose(1, 2, 0)):
            tifffile.imwrite(path, stored, photometric="minisblack", compression=compression)
            assert np.array_equal(read_micrograph(path).values, planes.transpose(1, 2, 0))
    clear = np.dstack([PLANES[:3].transpose(1, 2, 0), PLANES[3]])
    tifffile.imwrite(path, clear, photometric="rgb", extrasamples=["unassalpha"], compression=compression)
    assert np.array_equal(read_micrograph(path).values, clear[:, :, :3])
    tifffile.imwrite(path, PLANES[0], photometric="miniswhite", compression=compression)
    assert np.array_equal(read_micrograph(path).values[:, :, 0], 65535 - PLANES[0])


def test_pillow_reads_what_tifffile_does_not(tmp_path):
    path = tmp_path / "a.tif"
    grey = (PLANES[0] // 16).astype(np.uint8)
    for compression in ("tiff_lzw", "packbits", "group4"):
        stored = Image.fromarray(grey > 100) if compression == "group4" else Image.fromarray(grey)
        stored.save(path, compression=compression)
        assert np.array_equal(read_micrograph(path).values[:, :, 0], np.asarray(stored.convert("L")))
    palette = Image.fromarray(grey)
    palette.putpalette([value for level in range(256) for value in (level, 0, 255 - level)])
    for name in ("a.tif", "a.png"):
        palette.save(tmp_path / name)
        assert np.array_equal(read_micrograph(tmp_path / name).values, np.asarray(palette.convert("RGB")))
        assert np.array_equal(read_masks(tmp_path / name), grey)  # numbers, whatever colours show them
    Image.fromarray(PLANES[0]).save(tmp_path / "deep.png")
    assert np.array_equal(read_micrograph(tmp_path / "deep.png").values[:, :, 0], PLANES[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.bool_])
def test_masks_of_any_integers(tmp_path, dtype):
    masks = (PLANES[0] % 2).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", masks, compression="zlib")
    assert np.array_equal(read_masks(tmp_path / "a.tif"), masks.astype(int))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (PLANES[0].astype(np.float32), "holds float32 numbers: masks are whole ones"),
        (3 - (PLANES[0] % 9).astype(np.int16), "has the number -5: masks are 0 for background"),
        (PLANES[0] % 9 + np.uint32(65530), "has the number 65538, above 65535: cut the image"),
        (PLANES[:3].astype(np.uint8).transpose(1, 2, 0), "has 3 channels: masks are grey"),
    ],
)
def test_what_are_no_masks(tmp_path, masks, message):
    tifffile.imwrite(tmp_path / "a_masks.tif", masks)
    with pytest.raises(ValueError, match=rf"a_masks.tif {message}"):
        read_masks(tmp_path / "a_masks.tif")
    Image.fromarray((PLANES[0] // 16).astype(np.uint8)).save(tmp_path / "a_masks.jpg")
    with pytest.raises(ValueError, match=r"a_masks.jpg \(its compression changes the numbers"):
        read_masks(tmp_path / "a_masks.jpg")


def test_damaged_files_are_named(tmp_path):
    Image.fromarray(PLANES[0]).save(tmp_path / "a.png")
    for name, compression in (("plain.tif", None), ("packed.tif", "zlib")):
        tifffile.imwrite(tmp_path / name, PLANES[0], compression=compression)
    Image.fromarray(PLANES[0].astype(np.uint8)).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.tif").write_text("no image")
    for read in (read_micrograph, read_masks):
        for path in sorted(tmp_path.iterdir()):
            with pytest.raises(ValueError, match=rf"^cannot read .*{path.name} \(.*\): replace or remove it$"):
                read(path)
    (tmp_path / "none.tif").write_bytes(b"II*\0\0\0\0\0")
    with pytest.raises(ValueError, match=r"none.tif \(it has no pages\)"):
        read_micrograph(tmp_path / "none.tif")


def test_stacks_series_and_what_else_is_no_image(tmp_path):
    for axes, message in (("ZYX", "axes ZYX of 5 x 24 x 32"), ("TYX", "axes TYX")):
        tifffile.imwrite(tmp_path / "a.ome.tif", PLANES, photometric="minisblack", metadata={"axes": axes})
        with pytest.raises(ValueError, match=f"a stack or series, {message}"):
            read_micrograph(tmp_path / "a.ome.tif")
    tifffile.imwrite(tmp_path / "a.tif", PLANES[0].astype(np.complex64))
    with pytest.raises(ValueError, match=r"a.tif \(its values are complex64: save them as 16-bit integers"):
        read_micrograph(tmp_path / "a.tif")
    write_ome(tmp_path / "a.ome.tif", np.concatenate([PLANES, PLANES]), None)
    with pytest.raises(ValueError, match="10 channels are more than 5: save those that matter"):
        read_micrograph(tmp_path / "a.ome.tif")


def test_large_files_are_mapped_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, shape=(40000, 30000), dtype=np.uint16)  # 2.4 GB that take no room on the disk
    assert os.stat(path).st_blocks * 512 < 2**20
    values = read_micrograph(path).values
    assert isinstance(values, np.memmap) and values.shape == (40000, 30000, 1) and values[39999, 29999, 0] == 0
    monkeypatch.setattr(micrograph, "MAX_BYTES", 1000)
    for options in ({"compression": "zlib"}, {"tile": (16, 16)}):
        tifffile.imwrite(path, PLANES[0], **options)
        with pytest.raises(ValueError, match=r"a.tif \(0 MB, compressed or scattered .* without compression"):
            read_micrograph(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(PLANES[0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png \(Image size .*: save it as TIFF without compression"):
        read_micrograph(tmp_path / "a.png")
