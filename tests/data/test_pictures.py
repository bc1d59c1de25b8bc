"""Pictures of every kind become what a viewer shows on a white page: against Pillow's and numpy's arithmetic."""

import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from forked import in_processes, joined
from lavin.runtime.errors import UserError
from util.chat.uploads import open_image
from util.data import images as pictures
from util.data.datasets import load_scienceqa
from util.data.images import IMAGE_ERRORS, LazyImage, load_image, open_picture
from util.data.instructions import Instructions, load_pictures

RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)  # 16 bits
NOISE = np.random.default_rng(0).integers(0, 256, (24, 30, 4), np.uint8)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def opened(path, image: Image.Image, **options) -> np.ndarray:
    image.save(path, **options)
    result = open_picture(path)
    assert result.mode == "RGB"
    return np.asarray(result)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, colour_type: int, width: int, rows: list[bytes], clear: bytes = b"") -> bytes:
    """A PNG of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"tRNS", clear) if clear else b"")
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


def tiff(bits: int, photometric: int, data: bytes, width: int) -> bytes:
    """A grey TIFF of one row, uncompressed, of a kind that Pillow does not write."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 12 * 9 + 4), (277, 1),
            (278, 1), (279, len(data))]
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value)
            for tag, value in tags) + struct.pack("<I", 0) + data)


# --- 8 bits, opaque: bit for bit as ever ---

@pytest.mark.parametrize("suffix, mode", [
    *[(suffix, mode) for suffix in ("png", "bmp", "tif", "gif") for mode in ("RGB", "L", "1", "P")],
    ("jpg", "RGB"), ("jpg", "L"), ("jpg", "YCbCr"), ("jpg", "CMYK"), ("tif", "CMYK"), ("webp", "RGB")])
def test_opaque_pictures_stay_bit_for_bit(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE[..., :3]).convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.equal(load_image(path, 16).permute(1, 2, 0), torch.from_numpy(expected))
    assert torch.equal(LazyImage(path, 16).decode(), load_image(path, 16))
    assert (np.asarray(open_picture(path)) == np.asarray(Image.open(path).convert("RGB"))).all()
    assert (np.asarray(open_image(path)) == np.asarray(open_picture(path))).all()


def test_cmyk_of_hand_worked_colours(tmp_path):
    """Cyan, and half black. JPEG stores CMYK inverted, as Adobe does."""
    image = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 128), (8, 0, 16, 8))
    for suffix, options in (("tif", {}), ("jpg", {"quality": 100})):
        pixels = opened(tmp_path / f"a.{suffix}", image, **options).astype(int)
        assert abs(pixels[4, [3, 12]] - [[0, 255, 255], [127, 127, 127]]).max() <= 2


def test_cmyk_without_adobes_marker(tmp_path):
    """Inverted all the same, as browsers take it."""
    Image.new("CMYK", (16, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    content = (tmp_path / "a.jpg").read_bytes()
    marker = content.index(b"\xff\xee\0\x0eAdobe")
    (tmp_path / "b.jpg").write_bytes(content[:marker] + content[marker + 16:])
    assert (np.asarray(open_picture(tmp_path / "b.jpg")) == np.asarray(open_picture(tmp_path / "a.jpg"))).all()


@pytest.mark.parametrize("name, data", [
    (b"gAMA", struct.pack(">I", 100_000)), (b"cHRM", struct.pack(">8I", *[30_000] * 8)), (b"iCCP", b"x\0\0garbage")])
def test_gamma_and_profiles_do_not_change_pixels(tmp_path, name, data):
    """CLIP was trained on pixels that were not corrected either."""
    content = png(8, 2, 1, [b"\x64\x96\xc8"])
    (tmp_path / "a.png").write_bytes(content[:33] + chunk(name, data) + content[33:])
    assert np.asarray(open_picture(tmp_path / "a.png")).tolist() == [[[100, 150, 200]]]


# --- Transparency ---

def on_white(pixels: np.ndarray) -> np.ndarray:
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    return np.broadcast_to(colour * alpha + 255 * (1 - alpha), (*pixels.shape[:2], 3))


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("RGBA", "tif"), ("RGBA", "webp"),
                                          ("LA", "tif")])
def test_alpha_is_laid_on_white(tmp_path, mode, suffix):
    pixels = NOISE if mode == "RGBA" else NOISE[..., :2]
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    assert abs(opened(tmp_path / f"a.{suffix}", Image.fromarray(pixels), **options) - on_white(pixels)).max() <= 1


def test_alpha_of_a_palette_with_an_alpha_channel():
    image = Image.fromarray(NOISE[..., 0] % 4)
    image.putpalette([0, 0, 0, 9, 9, 9, 90, 0, 0, 0, 255, 0])
    image.putalpha(Image.fromarray(NOISE[..., 3]))
    assert image.mode == "PA"
    expected = on_white(np.asarray(image.convert("RGBA")))
    assert abs(np.asarray(pictures.to_rgb(image)) - expected).max() <= 1


def test_a_palette_of_colours_with_alpha():
    """Some TGAs have such palettes."""
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0], "RGBA")
    image.putpixel((1, 0), 1)
    assert np.asarray(pictures.to_rgb(image))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("mode, colours, clear", [
    ("P", (0, 1), 1), ("P", (0, 1), b"\xff\x00"), ("L", (0, 7), 7), ("RGB", ((0, 0, 0), (1, 2, 3)), (1, 2, 3)),
    ("1", (0, 1), 1), ("I;16", (0, 700), 700)])
def test_a_declared_colour_is_transparent(tmp_path, mode, colours, clear):
    """Black strokes on nothing, as PNG's tRNS declares it."""
    image = Image.new(mode, (8, 2), colours[1])
    image.paste(colours[0], (2, 0, 4, 2))
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 10, 10])
    pixels = opened(tmp_path / "a.png", image, transparency=clear)
    assert (pixels[:, 2:4] == 0).all() and (pixels[:, [0, 1, 4, 5, 6, 7]] == 255).all()


@pytest.mark.parametrize("bits, colour_type, row, clear", [
    (1, 0, b"\x80", b"\0\0"), (1, 0, b"\x40", b"\0\1"), (2, 0, b"\x90", b"\0\1"), (4, 0, b"\x72", b"\0\2"),
    (2, 0, b"\x40", b"\0\0"), (16, 0, b"\x80\0\0\1", b"\0\1"),
    (16, 2, b"\x80\x10" * 3 + b"\x01\x02\x03\x04\x05\x06", b"\x01\x02\x03\x04\x05\x06")])
def test_a_declared_colour_of_any_depth(tmp_path, bits, colour_type, row, clear):
    """The second pixel of two, or of a byte's first two, has the transparent colour; the first has not."""
    (tmp_path / "a.png").write_bytes(png(bits, colour_type, 2, [row], clear))
    pixels = np.asarray(open_picture(tmp_path / "a.png"))
    first = {(1, b"\x80"): 255, (1, b"\x40"): 0, (2, b"\x90"): 170, (4, b"\x72"): 119, (2, b"\x40"): 85}
    assert (pixels[0, 1] == 255).all()
    assert abs(pixels[0, 0].astype(int) - first.get((bits, row), 128)).max() <= 0


# --- More than 8 bits ---

@pytest.mark.parametrize("suffix, mode", [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("tif", "I"),
                                          ("tif", "F")])
def test_deep_greys_keep_their_range(tmp_path, suffix, mode):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
    pixels = opened(tmp_path / f"a.{suffix}", Image.fromarray(RAMP.astype(dtype)))
    assert abs(pixels - (RAMP / 257.)[..., None]).max() <= 0.5 and len(np.unique(pixels)) == 256


@pytest.mark.parametrize("scale, dtype", [(1, "f4"), (255, "f4"), (65535, "f4"), (255, "i4"), (65535, "i4")])
def test_floats_and_integers_of_no_declared_range(tmp_path, scale, dtype):
    """The smallest of 1 (floats only), 255 and 65535 that holds all values is white."""
    values = (np.linspace(0, 1, 64).reshape(8, 8) * scale).astype(dtype)
    pixels = opened(tmp_path / "a.tif", Image.fromarray(values))
    assert abs(pixels - (values / scale * 255)[..., None]).max() <= 0.51


@pytest.mark.parametrize("value", [-1, 70_000, float("nan"), float("inf")])
def test_numbers_that_are_no_grey_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], "f4")).save(tmp_path / "a.tif")
    with pytest.raises(IMAGE_ERRORS, match="not between 0 and 65535: save it with 8 or 16 bits"):
        open_picture(tmp_path / "a.tif")


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    for suffix in ("png", "tif", "pgm"):
        assert (opened(tmp_path / f"a.{suffix}", Image.fromarray(np.full((4, 4), 200, "u2"))) == 1).all()


@pytest.mark.parametrize("bits, photometric, data, expected", [
    (16, 1, struct.pack("<HH", 0, 65535), [0, 255]), (16, 0, struct.pack("<HH", 0, 65535), [255, 0]),
    (12, 1, b"\xff\xf8\x00", [255, 128]), (8, 0, b"\x00\xff", [255, 0])])
def test_depth_and_polarity_of_a_tiff(tmp_path, bits, photometric, data, expected):
    (tmp_path / "a.tif").write_bytes(tiff(bits, photometric, data, 2))
    assert np.asarray(open_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("colour_type, row, expected", [
    (2, b"\xff\xff\x80\0\0\0", [255, 128, 0]), (4, b"\x80\0\x80\0", [191] * 3), (4, b"\0\0\0\0", [255] * 3),
    (6, b"\xff\xff\x80\0\0\0\xff\xff", [255, 128, 0]), (6, b"\xff\xff\x80\0\0\0\x80\0", [255, 191, 127])])
def test_colour_and_alpha_of_16_bits(tmp_path, colour_type, row, expected):
    (tmp_path / "a.png").write_bytes(png(16, colour_type, 1, [row]))
    assert np.asarray(open_picture(tmp_path / "a.png")).tolist() == [[expected]]


# --- Orientation ---

def exif_bytes(orientation) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_every_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE[..., :3]).save(path, exif=exif_bytes(orientation))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[0] == (30 if orientation > 4 else 24)
    for read in (open_picture, open_image):
        assert (np.asarray(read(path)) == expected).all()
        assert not read(path).getexif()  # so that nothing turns it again


@pytest.mark.parametrize("pixels", [RAMP[:20], NOISE])
def test_orientation_of_deep_and_transparent_pictures(tmp_path, pixels):
    upright = opened(tmp_path / "a.png", Image.fromarray(pixels))
    turned = opened(tmp_path / "b.png", Image.fromarray(np.rot90(pixels)), exif=exif_bytes(6))
    assert (turned == upright).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0", b"Exif\0\0", exif_bytes(9).tobytes(),
                                  exif_bytes(0).tobytes()])
def test_broken_exif_does_not_break_the_picture(tmp_path, exif, suffix):
    pixels = opened(tmp_path / f"a.{suffix}", Image.fromarray(NOISE[..., :3]), exif=exif)
    assert (pixels == np.asarray(Image.open(tmp_path / f"a.{suffix}"))).all()


def test_orientation_beside_other_tags_that_cannot_be_written_again(tmp_path):
    """The orientation alone matters: exif_transpose writes all tags, and fails on such a one."""
    tags = struct.pack("<HHHIHHHHIBBBBI", 2, 0x0112, 3, 1, 6, 0, 0xA005, 7, 1, 9, 9, 9, 9, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (4, 6)


def test_orientation_in_xmp(tmp_path):
    """Adobe's programs write it there."""
    xmp = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
           b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>')
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", xmp=xmp)
    assert open_picture(tmp_path / "a.jpg").size == (4, 6)


# --- Animations, and containers of several pictures ---

@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    pixels = opened(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    assert abs(pixels.astype(int) - RED).max() < 4


def test_transparent_gif(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 20, 30, 40])
    image.paste(0, (0, 0, 4, 8))
    frame = image.copy()
    frame.paste(0, (0, 0, 8, 4))
    pixels = opened(tmp_path / "a.gif", image, transparency=1, save_all=True, append_images=[frame])
    assert (pixels[:, :4] == 0).all() and (pixels[:, 4:] == 255).all()


def test_a_jpeg_of_several_pictures(tmp_path):
    """Phones and cameras write such files (MPO), and name them .jpg."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:], exif=exif_bytes(6))
    for read in (open_picture, open_image):
        assert abs(np.asarray(read(tmp_path / "a.jpg")).astype(int) - RED).max() < 4


def test_a_wrong_suffix_does_not_matter(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.jpg", "WEBP", lossless=True)
    assert (np.asarray(open_image(tmp_path / "a.jpg")) == RED).all()


NO_PICTURES = [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<!DOCTYPE html>",
               b"%PDF-1.4\n", b"PK\3\4", b"version https://git-lfs.github.com/spec/v1\n", png(8, 2, 0, [b""]),
               b"GIF89a\0\0\0\0\0\0\0;"]  # the last two have no pixels


@pytest.mark.parametrize("content", NO_PICTURES)
def test_what_is_no_picture_whatever_its_name(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content + bytes(99))
    with pytest.raises(IMAGE_ERRORS, match="cannot identify"):
        load_image(tmp_path / "a.png", 8)
    what = "is a HEIC or AVIF picture, as phones take them, which cannot be read here" if b"heic" in content else (
        "is not a picture")
    with pytest.raises(UserError, match=f"^a.png {what}: send a JPEG"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_small_file_with_much_text_is_not_unpacked(tmp_path, name):
    content = png(8, 2, 1, [b"\x64\x96\xc8"])
    bomb = chunk(name, b"x\0\0" + zlib.compress(bytes(3_000_000)))
    (tmp_path / "a.png").write_bytes(content[:33] + bomb + content[33:])
    with pytest.raises(IMAGE_ERRORS, match="(?i)too large"):
        load_image(tmp_path / "a.png", 8)
    with pytest.raises(UserError, match="(?i)^a.png is broken .*too large"):
        open_image(tmp_path / "a.png")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_a_bad_file(tmp_path):
    """Its decoder raises what no other does: wherever 8 bytes are lost, the file decodes or is a bad one."""
    path = tmp_path / "a.avif"
    Image.fromarray(NOISE[..., :3]).save(path)
    whole, faults = path.read_bytes(), set()
    for i in range(0, 200, 3):
        path.write_bytes(whole[:i] + b"\xff" * 8 + whole[i + 8:])
        faults.add(LazyImage(path, 8).problem())
    assert any("Failed to decode" in str(fault) for fault in faults)


def test_more_pixels_than_a_picture_has_are_not_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    assert "400000000 pixels) exceeds limit" in LazyImage(tmp_path / "a.png", 8).problem()


@pytest.mark.parametrize("suffix, end, words", [
    ("jpg", -2, "truncated"), ("jpg", -40, "truncated"), ("png", -12, None), ("png", None, None), ("jpg", None, None)])
def test_files_that_lack_their_end_or_go_on_behind_it(tmp_path, suffix, end, words):
    """A JPEG without its last marker may lack pixels; a PNG without its last chunk does not."""
    path = tmp_path / f"a.{suffix}"
    whole = opened(path, Image.fromarray(NOISE[..., :3]))
    path.write_bytes(path.read_bytes()[:end] if end else path.read_bytes() + b"more")
    if words:
        with pytest.raises(IMAGE_ERRORS, match=words):
            open_picture(path)
    else:
        assert (np.asarray(open_picture(path)) == whole).all()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
                                  lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("a.png"))
    for read in (open_picture, open_image):
        with pytest.raises((UserError, *IMAGE_ERRORS), match="it is no file"):
            read(Path("a.png"))


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_extreme_shapes(tmp_path, size):
    Image.new("RGBA", size, (255, 0, 0, 255)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 4).flatten(1).T.unique(dim=0).tolist() == [list(RED)]


def test_lab(tmp_path):
    """L* 50.2 is sRGB 119; Pillow before version 12 has no conversion, which takes one line."""
    Image.new("LAB", (4, 4), (128, 128, 128)).save(tmp_path / "a.tif")
    try:
        assert abs(np.asarray(open_image(tmp_path / "a.tif")).astype(int) - 119).max() <= 1
    except UserError as error:
        assert "conversion from LAB to RGB not supported" in str(error)


# --- Several processes ---

def left(ids, checksum="0") -> dict:
    return dict.fromkeys(ids, checksum)


def ranks(monkeypatch, *others):
    """This process as rank 0, in front of others with these pictures."""
    others = [list(of_rank.items()) for of_rank in others]

    def gather(value):
        return [value, *([pictures.json_sha256(ids) for ids in others] if isinstance(value, str) else others)]

    monkeypatch.setattr(pictures, "all_gather_object", gather)


@pytest.mark.parametrize("others, words", [
    (left("ac"), "^question b: rank 0 and rank 2 differ in it, and have 3 and 2 left"),
    (left("abcd"), "^question d: rank 0 and rank 2 differ in it, and have 3 and 4 left"),
    (left("bac"), "^question a: rank 0 and rank 2 differ in it"),
    (left("abc") | {"b": "1"}, "^question b: rank 0 and rank 2 differ in it"),
    (left("abc") | {"c": None}, "^question c: rank 0 and rank 2 differ in it")])
def test_processes_that_see_different_pictures(monkeypatch, others, words):
    ranks(monkeypatch, left("abc"), others)
    with pytest.raises(UserError, match=words):
        pictures.require_equal_ranks(left("abc"), "question")
    ranks(monkeypatch, left("abc"))
    pictures.require_equal_ranks(left("abc"), "question")


def test_both_kinds_of_data_compare(monkeypatch, scienceqa, tmp_path):
    ranks(monkeypatch, left(["none"]))
    with pytest.raises(UserError, match="^question .*rank 1 differ"):
        pictures.load_images(load_scienceqa(scienceqa, "test"), 8, 2, skip_bad=True)
    monkeypatch.setattr(LazyImage, "problem", lambda image: None)
    data = Instructions(tmp_path, [{"instruction": "a", "answer": "b", "image": "c.jpg"}])
    ranks(monkeypatch, left(["d.jpg"]))
    with pytest.raises(UserError, match="^picture c.jpg: rank 0 and rank 1 differ"):
        load_pictures(data, 8, 1, skip_bad=True)


def missing(path) -> None:
    path.unlink()


def another(path) -> None:
    Image.new("RGB", (9, 9)).save(path)


@pytest.mark.parametrize("change, words", [
    (None, "3"), (missing, "question 113: rank 0 and rank 1 differ in it, and have 6 and 5 left"),
    (another, "question 113: rank 0 and rank 1 differ in it, and have 6 and 6 left")])
def test_two_nodes(scienceqa, scienceqa_copy, change, words):
    """A picture is missing on the second, or another one."""
    if change:
        change(scienceqa_copy / "images" / "test" / "113" / "image.png")

    def load() -> str:
        with joined() as (rank, _):
            try:
                scienceqa_of_node = load_scienceqa((scienceqa, scienceqa_copy)[rank], "test")
                return str(len(pictures.load_images(scienceqa_of_node, 8, 2, skip_bad=True)))
            except UserError as error:
                return str(error)
    assert all(said.startswith(words) for said in in_processes(load, 2))
