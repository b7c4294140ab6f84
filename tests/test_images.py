"""Grey levels and colours of each kind of picture that a clinic exports; the one door for pixels.

All files are made here."""

import os
import struct
import sys
import zlib

import made_data
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from cmi_mtl.config import CMIMTLProcessor
from cmi_mtl.core import InputError
from cmi_mtl.images import image_fault, image_to_pixels, open_image, read_image, square

RAMP = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (16, 1))
MIDDLE = np.tile(np.linspace(1500, 2500, 64).astype(np.uint16), (16, 1))
WHOLE = dict(WindowCenter=2048, WindowWidth=4096)


def dicom(path, a, meta=True, **header):
    """A DICOM file of `a`: (H, W) grey or (H, W, 3) RGB.

    `header` goes before what the numbers say; None deletes."""
    info = FileMetaDataset()
    info.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    info.MediaStorageSOPInstanceUID = generate_uid()
    info.TransferSyntaxUID = header.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    ds = FileDataset(str(path), {}, file_meta=info, preamble=bytes(128))
    ds.SOPClassUID = info.MediaStorageSOPClassUID
    ds.SOPInstanceUID = info.MediaStorageSOPInstanceUID
    ds.Modality, ds.Rows, ds.Columns = "OT", *a.shape[:2]
    ds.SamplesPerPixel = 3 if a.ndim == 3 else 1
    ds.PhotometricInterpretation = "RGB" if a.ndim == 3 else "MONOCHROME2"
    if a.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * a.dtype.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(a.dtype.kind == "i")
    ds.PixelData = a.tobytes() + bytes(a.nbytes % 2)
    for name, value in header.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    if meta:
        ds.save_as(path, enforce_file_format=True)
    else:
        ds.preamble, ds.file_meta = None, FileMetaDataset()
        implicit = info.TransferSyntaxUID == ImplicitVRLittleEndian
        ds.save_as(path, enforce_file_format=False, implicit_vr=implicit, little_endian=True)
    return path


def grey(path):
    "One row of a grey picture, once its channels are seen to be equal and a loader accepts it."
    assert image_fault(path) is None
    picture = read_image(path)
    assert picture.mode == "RGB"
    a = np.asarray(picture).astype(int)
    assert (a == a[..., :1]).all()
    return a[0, :, 0]


def shown(folder, a, **header):
    "One row of a DICOM picture."
    return grey(dicom(folder / "shown.dcm", a, **header))


def refused(path):
    "The message of `read_image`, which `image_fault` must find too."
    with pytest.raises(InputError) as e:
        read_image(path)
    problem, found = e.value.problems[0], image_fault(path)
    assert (found.what, found.remedy) == (problem.what, problem.remedy)
    assert str(path) in str(e.value)
    return str(e.value)


# ---- DICOM: windows


def near(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max() <= 1


def test_window_is_the_full_scale(tmp_path):
    levels = shown(tmp_path, MIDDLE, **WHOLE)
    assert near(levels, MIDDLE[0] / 4095 * 255)
    assert levels.min() > 90 and levels.max() < 160


def test_first_of_several_windows(tmp_path):
    many = shown(tmp_path, MIDDLE, WindowCenter=[2048, 10], WindowWidth=[4096, 20])
    assert near(many, MIDDLE[0] / 4095 * 255)


@pytest.mark.parametrize("width", [0, -5, ""])
def test_window_without_width_is_none(tmp_path, width):
    assert near(shown(tmp_path, RAMP, WindowCenter=100, WindowWidth=width), RAMP[0] / 4095 * 255)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("centre, width", [(9000, 400), (100, 200), (10**8, 10**9)])
def test_window_that_shows_one_grey_is_none(tmp_path, centre, width, photometric):
    "It lies beside all values, or they differ by nothing in it."
    header = dict(PhotometricInterpretation=photometric)
    none = shown(tmp_path, MIDDLE, **header)
    assert set(none[[0, -1]]) == {0, 255}
    assert near(shown(tmp_path, MIDDLE, WindowCenter=centre, WindowWidth=width, **header), none)


def test_window_beside_tissue_is_none_though_it_holds_the_padding(tmp_path):
    a = MIDDLE.copy()
    a[:, :8] = 0
    padded = dict(PixelPaddingValue=0)
    beside = shown(tmp_path, a, WindowCenter=0, WindowWidth=100, **padded)
    assert near(beside, shown(tmp_path, a, **padded)) and beside.max() == 255


def test_window_that_shows_a_little_is_kept(tmp_path):
    levels = shown(tmp_path, MIDDLE, WindowCenter=2500, WindowWidth=100)
    assert (levels[:-4] == 0).all() and 100 < levels[-1] < 160


def test_window_narrower_than_one(tmp_path):
    "Of values with a small slope, as in PET."
    levels = shown(
        tmp_path,
        RAMP,
        RescaleSlope="0.0001",
        RescaleIntercept="0",
        WindowCenter="0.2",
        WindowWidth="0.4",
    )
    assert near(levels, np.minimum(RAMP[0] / 4000, 1) * 255)


@pytest.mark.parametrize("level, expected", [(1024, 64), (3072, 191)])
def test_flat_picture_has_the_level_of_its_window(tmp_path, level, expected):
    assert near(shown(tmp_path, np.full((4, 4), level, np.uint16), **WHOLE), expected)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_flat_picture_without_window_is_mid_grey(tmp_path, photometric):
    a = np.full((4, 4), 7, np.uint16)
    assert set(shown(tmp_path, a, PhotometricInterpretation=photometric)) == {128}


def test_sigmoid_window(tmp_path):
    levels = shown(tmp_path, RAMP, WindowCenter=2048, WindowWidth=2048, VOILUTFunction="SIGMOID")
    assert near(levels, 255 / (1 + np.exp(-4 * (RAMP[0].astype(float) - 2048) / 2048)))


@pytest.mark.parametrize("function", ["LINEAR_EXACT", ""])
def test_other_window_functions(tmp_path, function):
    assert near(shown(tmp_path, MIDDLE, VOILUTFunction=function, **WHOLE), MIDDLE[0] / 4096 * 255)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_table_goes_before_the_window(tmp_path, bits):
    "A table that makes high dark, and whose middle is not the picture's middle."
    item = Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    top = 2**bits - 1
    item.LUTData = np.linspace(top / 2, 0, 4096).round().astype("<u2").tobytes()
    levels = shown(tmp_path, RAMP, VOILUTSequence=Sequence([item]), **WHOLE)
    assert near(levels, (1 - RAMP[0] / 4095) * 127.5)


@pytest.mark.parametrize("slope, intercept", [("", ""), ("1", ""), ("", "0")])
def test_empty_rescale_values(tmp_path, slope, intercept):
    levels = shown(tmp_path, MIDDLE, RescaleSlope=slope, RescaleIntercept=intercept, **WHOLE)
    assert near(levels, MIDDLE[0] / 4095 * 255)


def test_window_is_in_rescaled_units(tmp_path):
    levels = shown(
        tmp_path,
        MIDDLE,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=1024,
        WindowWidth=4096,
    )
    assert near(levels, MIDDLE[0] / 4095 * 255)


def test_negative_slope(tmp_path):
    levels = shown(
        tmp_path,
        MIDDLE,
        RescaleSlope=-1,
        RescaleIntercept=4095,
        WindowCenter=2048,
        WindowWidth=4096,
    )
    assert near(levels, 255 - MIDDLE[0] / 4095 * 255)


def test_low_is_white(tmp_path):
    levels = shown(tmp_path, MIDDLE, PhotometricInterpretation="MONOCHROME1", **WHOLE)
    assert near(levels, 255 - MIDDLE[0] / 4095 * 255)
    levels = shown(tmp_path, RAMP, PhotometricInterpretation="MONOCHROME1")
    assert near(levels, 255 - RAMP[0] / 4095 * 255)


def test_eight_bits_are_never_stretched(tmp_path):
    a = np.tile(np.arange(40, 104, dtype=np.uint8), (16, 1))
    Image.fromarray(a).save(tmp_path / "a.png")
    dicom(tmp_path / "a.dcm", a)
    dicom(tmp_path / "b.dcm", a.astype(np.uint16), BitsStored=8, HighBit=7)
    for name in ("a.png", "a.dcm", "b.dcm"):
        assert (grey(tmp_path / name) == a[0]).all()
    Image.new("L", (8, 8), 70).save(tmp_path / "flat.png")
    assert set(grey(tmp_path / "flat.png")) == {70}


def test_eight_bits_with_a_sign_are_stretched(tmp_path):
    a = np.tile(np.arange(-64, 64, dtype=np.int8), (16, 1))
    assert near(shown(tmp_path, a), (a[0].astype(int) + 64) / 127 * 255)


def test_eight_bits_in_other_units_are_stretched(tmp_path):
    a = np.tile(np.arange(40, 104, dtype=np.uint8), (16, 1))
    levels = shown(tmp_path, a, RescaleSlope=2, RescaleIntercept=-1000)
    assert near(levels, (a[0] - 40) / 63 * 255)


# ---- DICOM: padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, WHOLE])
def test_padding_is_black_and_not_in_the_range(tmp_path, photometric, window):
    a = MIDDLE.astype(np.int16)
    a[:, :8] = -2000
    header = dict(PixelPaddingValue=-2000, PhotometricInterpretation=photometric, **window)
    levels = shown(tmp_path, a, **header)
    tissue = a[0, 8:].astype(float)
    expected = tissue / 4095 if window else (tissue - tissue.min()) / (tissue.max() - tissue.min())
    assert (levels[:8] == 0).all()
    assert near(levels[8:], 255 * (1 - expected if photometric == "MONOCHROME1" else expected))


def test_range_of_padding(tmp_path):
    a = MIDDLE.copy()
    a[:, :8] = np.arange(8) * 100 + 60000
    levels = shown(tmp_path, a, PixelPaddingValue=65000, PixelPaddingRangeLimit=60000)
    assert (levels[:8] == 0).all() and levels[8] == 0 and levels[9] > 0 and levels[-1] == 255


def test_padding_written_as_unsigned(tmp_path):
    "-2000 written as 63536, as some scanners do."
    a = MIDDLE.astype(np.int16)
    a[:, :8] = -2000
    path = dicom(tmp_path / "a.dcm", a, PixelPaddingValue=-2000)
    data = path.read_bytes()
    tag = b"\x28\x00\x20\x01SS"
    assert data.count(tag) == 1
    path.write_bytes(data.replace(tag, b"\x28\x00\x20\x01US"))
    levels = grey(path)
    assert (levels[:8] == 0).all()
    assert near(levels[8:], (a[0, 8:] - a[0, 8]) / (2500 - a[0, 8]) * 255)


@pytest.mark.parametrize("header", [{}, WHOLE, dict(BitsStored=8, HighBit=7)], ids=str)
def test_nothing_but_padding(tmp_path, header):
    a = np.full((4, 4), 9, np.uint16)
    message = refused(dicom(tmp_path / "a.dcm", a, PixelPaddingValue=9, **header))
    assert "holds no value" in message and "Export it" in message


# ---- DICOM: colours

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [10, 20, 200], [128, 128, 128]]] * 4, np.uint8)


def test_rgb(tmp_path):
    assert (np.asarray(read_image(dicom(tmp_path / "a.dcm", COLOURS))) == COLOURS).all()


def test_rgb_of_16_bits(tmp_path):
    path = dicom(tmp_path / "a.dcm", COLOURS.astype(np.uint16) * 257)
    assert image_fault(path) is None and (np.asarray(read_image(path)) == COLOURS).all()
    path = dicom(tmp_path / "b.dcm", COLOURS.astype(np.uint16) * 16, BitsStored=12, HighBit=11)
    assert near(read_image(path), COLOURS)


def test_ybr(tmp_path):
    ybr = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))
    path = dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.asarray(read_image(path)).astype(int) - COLOURS).max() <= 3


@pytest.mark.parametrize("bits, kind", [(8, np.uint8), (16, np.uint16)])
def test_palette(tmp_path, bits, kind):
    top, header = 2**bits - 1, {}
    for name, level in (("Red", 1.0), ("Green", 0.5), ("Blue", 0.0)):
        table = (np.linspace(0, top, 256) * level).astype(kind)
        header[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        header[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    index = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    path = dicom(tmp_path / "a.dcm", index, PhotometricInterpretation="PALETTE COLOR", **header)
    a = np.asarray(read_image(path))
    assert near(a[0, :, 0], np.arange(256)) and near(a[0, :, 1], np.arange(256) / 2)
    assert (a[..., 2] == 0).all()


# ---- DICOM: files


@pytest.mark.parametrize("suffix", ["dcm", "img"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("meta", [True, False])
def test_file_without_preamble(tmp_path, suffix, syntax, meta):
    path = dicom(tmp_path / f"a.{suffix}", MIDDLE, meta=meta, TransferSyntaxUID=syntax, **WHOLE)
    if meta:
        path.write_bytes(path.read_bytes().removeprefix(bytes(128) + b"DICM"))
    assert path.read_bytes()[128:132] != b"DICM"
    assert near(grey(path), MIDDLE[0] / 4095 * 255)


def test_contents_decide_not_the_suffix(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / "png.dcm")
    assert (np.asarray(read_image(tmp_path / "png.dcm")) == COLOURS).all()
    assert image_fault(tmp_path / "png.dcm") is None
    assert (np.asarray(read_image(dicom(tmp_path / "dicom.png", COLOURS))) == COLOURS).all()


def test_dicom_of_several_frames(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.tile(RAMP, (3, 1)), NumberOfFrames=3, Rows=16)
    message = refused(path)
    assert "holds 3 pages or frames" in message and "Export the one" in message
    rgb = dicom(tmp_path / "b.dcm", np.tile(COLOURS, (2, 1, 1)), NumberOfFrames=2, Rows=4)
    assert "holds 2 pages or frames" in refused(rgb)
    assert near(shown(tmp_path, RAMP, NumberOfFrames=1), RAMP[0] / 4095 * 255)


def test_dicom_without_pydicom(tmp_path, monkeypatch):
    "Without the package other pictures are read, and a DICOM file's message names the package."
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    whole = dicom(tmp_path / "a.dcm", RAMP)
    bare = tmp_path / "bare.dcm"  # no preamble
    bare.write_bytes(whole.read_bytes()[132:])
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert read_image(tmp_path / "a.png").size == (4, 4)
    for path in (whole, bare):
        with pytest.raises(InputError, match=f"{path.name}: is DICOM, which needs pydicom. pip"):
            read_image(path)


def test_dicom_without_picture_or_decoder(tmp_path):
    message = refused(dicom(tmp_path / "a.dcm", RAMP, PixelData=None))
    assert "without pixels" in message and "not a report" in message
    path = dicom(tmp_path / "b.dcm", RAMP)
    data = path.read_bytes()
    old, new = (str(uid).encode() for uid in (ExplicitVRLittleEndian, JPEGLSLossless))
    old, new = (x + bytes(len(x) % 2) for x in (old, new))
    old, new = (b"\x02\x00\x10\x00UI" + len(x).to_bytes(2, "little") + x for x in (old, new))
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    message = refused(path)
    assert "JPEG-LS" in message
    for package in ("python-gdcm>=", "pylibjpeg-libjpeg>=", "pip install 'cmi_mtl[dicom]'"):
        assert package in message


# ---- TIFF, PNG, JPEG, GIF


@pytest.mark.parametrize("a", [RAMP, RAMP.astype(np.float32)])
def test_tiff_whose_zero_is_white(tmp_path, a):
    Image.fromarray(a).save(tmp_path / "black.tif")
    Image.fromarray(a).save(tmp_path / "white.tif", tiffinfo={262: 0})
    assert Image.open(tmp_path / "white.tif").tag_v2[262] == 0
    assert near(grey(tmp_path / "black.tif"), RAMP[0] / 4095 * 255)
    assert near(grey(tmp_path / "white.tif"), 255 - RAMP[0] / 4095 * 255)


def test_8_bit_tiff_whose_zero_is_white(tmp_path):
    a = np.tile(np.arange(64, dtype=np.uint8), (4, 1))
    Image.fromarray(a).save(tmp_path / "a.tif")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index(b"\x06\x01\x03\x00\x01\x00\x00\x00\x01")  # tag 262, one SHORT, 1
    data[at + 8] = 0
    (tmp_path / "a.tif").write_bytes(data)
    assert (grey(tmp_path / "a.tif") == 255 - a[0]).all()


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_pixels_without_a_value(tmp_path, hole):
    a = RAMP.astype(np.float32)
    a[:, :8] = hole
    Image.fromarray(a).save(tmp_path / "a.tif")
    levels = grey(tmp_path / "a.tif")
    assert (levels[:9] == 0).all()
    assert near(levels[8:], (a[0, 8:] - a[0, 8]) / (4095 - a[0, 8]) * 255)
    Image.fromarray(np.full((4, 4), hole, np.float32)).save(tmp_path / "none.tif")
    assert "holds no value" in refused(tmp_path / "none.tif")


def test_flat_16_bit_picture_is_mid_grey(tmp_path):
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 0.3, np.float32)).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert set(grey(tmp_path / name)) == {128}


def png48(path, a):
    "An RGB picture of 16 bits per channel, which Pillow cannot write."

    def chunk(name, data):
        number = struct.Struct(">I").pack
        return number(len(data)) + name + data + number(zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", a.shape[1], a.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def test_png_of_48_bits(tmp_path):
    path = png48(tmp_path / "a.png", COLOURS.astype(np.uint16) * 257)
    assert image_fault(path) is None and (np.asarray(read_image(path)) == COLOURS).all()
    dark = png48(tmp_path / "dark.png", COLOURS.astype(np.uint16) * 16)
    message = refused(dark)
    assert "almost black" in message and "16-bit grey" in message
    with pytest.raises(InputError, match="almost black"):
        open_image(COLOURS.astype(np.uint16) * 16)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png", "a.webp"])
def test_several_pages(tmp_path, name):
    pages = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 90, 200)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    message = refused(tmp_path / name)
    assert "holds 3 pages or frames" in message and "Export the one" in message


def test_one_page(tmp_path):
    for name in ("a.tif", "a.gif"):
        Image.new("L", (8, 8), 90).save(tmp_path / name)
        assert set(grey(tmp_path / name)) == {90}


def test_telephone_picture_with_a_second_one_for_display(tmp_path):
    more = [Image.new("L", (4, 4), 9)]
    Image.new("L", (8, 8), 90).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=more)
    assert Image.open(tmp_path / "a.jpg").format == "MPO" and near(grey(tmp_path / "a.jpg"), 90)


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[False, True]] * 4)).save(tmp_path / "a.png")
    assert grey(tmp_path / "a.png").tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["LA", "P", "RGBA"])
def test_transparency_is_black(tmp_path, mode):
    picture = Image.new("RGBA", (4, 4), (200, 200, 200, 255))
    picture.paste((90, 90, 90, 0), (0, 0, 2, 4))
    hidden = {"transparency": 0} if mode == "P" else {}
    if mode == "P":
        picture = Image.fromarray(np.array([[0, 0, 1, 1]] * 4, np.uint8)).convert("P")
        picture.putpalette([90, 90, 90, 200, 200, 200])
    picture.convert(mode).save(tmp_path / "a.png", **hidden)
    assert Image.open(tmp_path / "a.png").mode == mode
    assert grey(tmp_path / "a.png").tolist() == [0, 0, 200, 200]


def test_turned_by_exif(tmp_path):
    a = np.zeros((8, 16, 3), np.uint8)
    a[:, :4] = 255
    for name in ("a.png", "a.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter to the right
        Image.fromarray(a).save(tmp_path / name, exif=exif, quality=95, subsampling=0)
        picture = read_image(tmp_path / name)
        assert picture.size == (8, 16)
        assert np.asarray(picture)[:3].min() > 200 and np.asarray(picture)[6:].max() < 55


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    pixel = np.asarray(read_image(tmp_path / "a.jpg")).astype(int)[8, 8]
    assert np.abs(pixel - (200, 30, 30)).max() <= 6


# ---- faults


def damaged(tmp_path):
    "Files that are no whole picture."
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    dicom(tmp_path / "cut.dcm", RAMP)
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "cut.dcm").read_bytes()[:-500])
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "short.dcm").write_bytes(b"\x08\x00\x05\x00CS")
    (tmp_path / "empty.jpg").write_bytes(b"")
    return sorted(p for p in tmp_path.iterdir() if p.is_file())


def test_damaged_files(tmp_path):
    for path in damaged(tmp_path):
        message = refused(path)
        assert "cannot be read as an image" in message and "Put a whole image" in message, message
        assert image_fault("mine.jpg", path.read_bytes()).what == image_fault(path).what


def test_dicom_whose_compressed_pixels_are_damaged(tmp_path):
    path = dicom(
        tmp_path / "a.dcm",
        COLOURS,
        TransferSyntaxUID=JPEGBaseline8Bit,
        PixelData=encapsulate([b"no JPEG"]),
    )
    message = refused(path)
    assert "JPEG Baseline" in message and "uncompressed" in message and "\n" not in message


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="no such image file"):
        read_image(tmp_path / "none.png")
    assert image_fault(tmp_path / "none.png").what == "is missing"
    assert image_fault(tmp_path).what == "is a folder, not an image"
    with pytest.raises(InputError, match="is a folder, not an image. Name one of its files"):
        read_image(tmp_path)


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.new("L", (60, 60)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    assert "has more than 1,800 pixels" in refused(tmp_path / "a.png")


def test_a_loader_does_not_decode_a_jpeg_in_full(tmp_path, monkeypatch):
    sizes, convert = [], Image.Image.convert
    Image.new("RGB", (1024, 512)).save(tmp_path / "a.jpg")

    def spy(image, *args):
        sizes.append(image.size)
        return convert(image, *args)

    monkeypatch.setattr(Image.Image, "convert", spy)
    assert image_fault(tmp_path / "a.jpg") is None
    assert max(sizes) == (128, 64)
    assert image_fault("mine.jpg", (tmp_path / "a.jpg").read_bytes()) is None


# ---- one door

RNG = np.random.default_rng(0)
WAYS = {
    "8-bit RGB": RNG.integers(0, 256, (33, 50, 3)).astype(np.uint8),
    "8-bit grey": RNG.integers(0, 200, (33, 50)).astype(np.uint8),
    "8-bit RGBA": RNG.integers(0, 256, (33, 50, 4)).astype(np.uint8),
    "16-bit grey": RNG.integers(300, 4000, (33, 50)).astype(np.uint16),
    "1 bit": RNG.integers(0, 2, (33, 50)).astype(bool),
}


@pytest.mark.parametrize("kind", WAYS)
def test_path_pil_image_and_array_are_one(tmp_path, kind):
    a = WAYS[kind]
    Image.fromarray(a).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        sources = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(a), opened, a]
        squares = [square(x, 40) for x in sources]
        pixels = [CMIMTLProcessor(None, image_size=40).pixels(x) for x in sources]
    assert squares[0].shape == (40, 40, 3) and squares[0].max() > squares[0].min()
    for other in squares[1:]:
        assert (other == squares[0]).all()
    for other in pixels:
        assert other.equal(image_to_pixels(tmp_path / "a.png", 40))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["8-bit RGB", "8-bit grey", "8-bit RGBA"])
def test_floats_from_0_to_1(kind, dtype):
    a = WAYS[kind]
    levels = (np.asarray(open_image(x)).astype(int) for x in (a, (a / 255).astype(dtype)))
    assert np.abs(np.subtract(*levels)).max() <= 1


def test_array_of_one_channel():
    a = WAYS["8-bit grey"]
    assert open_image(a[..., None]) == open_image(a)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64])
def test_other_integers_are_stretched(dtype):
    a = WAYS["16-bit grey"]
    assert open_image(a.astype(dtype)) == open_image(Image.fromarray(a))
    assert np.asarray(open_image(a.astype(dtype))).max() == 255


def test_colours_of_16_bits_keep_their_scale():
    assert (np.asarray(open_image(COLOURS.astype(np.uint16) * 257)) == COLOURS).all()


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_pil_image_of_any_mode(mode):
    source = Image.fromarray(RAMP) if mode == "I;16" else Image.new("L", (8, 8), 99).convert(mode)
    picture = open_image(source)
    assert picture.mode == "RGB" and picture.size == source.size and open_image(picture) == picture


CLEAR = [("LA", (200, 0)), ("PA", (0, 0)), ("RGBA", (200, 200, 200, 0))]


@pytest.mark.parametrize("mode, colour", CLEAR)
def test_what_is_transparent_is_black(mode, colour):
    picture = Image.new(mode, (4, 4), colour)
    if mode == "PA":
        picture.putpalette([200, 200, 200] * 256)
    assert np.asarray(open_image(picture)).max() == 0


def test_pil_image_turned_by_exif(tmp_path):
    picture = Image.new("RGB", (16, 8), "white")
    picture.getexif()[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=picture.getexif())
    path = tmp_path / "a.png"
    for source in (path, Image.open(path), read_image(path)):
        assert open_image(source).size == (8, 16)


BAD = {
    "two channels": (np.zeros((4, 4, 2)), "shape (4, 4, 2)", "1, 3 or 4 channels"),
    "channels first": (np.zeros((3, 8, 8)), "shape (3, 8, 8)", "(height, width, channels)"),
    "no pixel": (np.zeros((0, 4)), "shape (0, 4)", "(height, width)"),
    "None": (None, "shape ()", "(height, width)"),
    "0 to 255 as floats": (WAYS["8-bit grey"] * 1.0, "floats from 0 to 199", "Give floats from 0"),
    "below 0": (np.full((4, 4), -0.5), "floats from -0.5", "Give floats from 0"),
    "NaN": (np.array([[0.5, np.nan]]), "floats from nan", "Give floats from 0"),
    "infinity": (np.array([[0.5, np.inf]]), "to inf", "Give floats from 0"),
    "words": (np.array([["a", "b"]]), "of <U1", "Give uint8"),
    "complex": (np.zeros((4, 4), complex), "of complex128", "Give uint8"),
    "long colours": (COLOURS.astype(np.int64), "of int64", "Give uint8"),
    "ragged": ([[1, 2], [3]], "cannot be read as an image", "an array"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arrays(kind):
    source, what, remedy = BAD[kind]
    with pytest.raises(InputError) as e:
        open_image(source)
    assert what in str(e.value) and remedy in str(e.value) and len(e.value.problems) == 1


def test_bad_pil_images(tmp_path):
    pages = [Image.new("L", (8, 8), level) for level in (0, 90)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="holds 2 pages or frames"):
        open_image(Image.open(tmp_path / "a.tif"))
    Image.fromarray(RNG.integers(0, 255, (64, 64)).astype(np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be read as an image"):
        open_image(Image.open(tmp_path / "cut.png"))


# ---- each fault with its own way out


@pytest.mark.parametrize(
    "data, what, remedy",
    [
        (b"", "the file is empty", "fetch this one again"),
        (b"\n<!DOCTYPE html><html>log in</html>", "it is a web page", "a page was saved"),
        (b"no picture", "of no known kind", "correct the name"),
        (made_data.picture(0, (300, 300), "PNG")[:-600], "truncated", "a part of this one is"),
    ],
)
def test_each_fault_of_a_file_has_its_own_remedy(tmp_path, data, what, remedy):
    path = made_data.write({"x.png": data}, tmp_path) / "x.png"
    message = refused(path)
    assert "cannot be read as an image" in message and what in message and remedy in message


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    path = made_data.write({"x.png": made_data.picture(0, kind="PNG")}, tmp_path) / "x.png"
    monkeypatch.setattr("builtins.open", denied)  # a test may run as root, who may read all
    assert "permission denied" in refused(path)


def test_a_file_that_the_disk_does_not_give(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error")

    path = made_data.write({"x.png": made_data.picture(0, kind="PNG")}, tmp_path) / "x.png"
    monkeypatch.setattr("builtins.open", failing)
    assert "cannot be read as an image (input/output error)" in refused(path)  # and not: empty


# ---- to a square


@pytest.mark.parametrize("size", [(500, 1), (1, 500), (400, 1), (1000, 3)], ids=str)
def test_something_is_left_of_a_thin_picture(size):
    lines = (square(Image.new("L", size, 255), 224)[..., 0] == 255).all(int(size[0] > size[1]))
    assert lines.sum() == 1
