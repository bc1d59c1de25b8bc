"""Opens uploaded images, which may be broken, huge or no images at all."""

from pathlib import Path

from PIL import Image

from lavin.runtime.errors import UserError, first_line
from util.data.images import IMAGE_ERRORS, open_picture

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow's others are rare, and some run external programs
MAX_PIXELS = 50_000_000  # 150 MB as RGB
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")


def open_image(path: str | Path) -> Image.Image:
    """Returns the image in the form in which open_picture gives it.

    Raises UserError where the file is no image, is truncated, or its header announces more than MAX_PIXELS.
    """
    name = Path(path).name
    try:
        return open_picture(path, FORMATS, MAX_PIXELS)
    except Image.DecompressionBombError as error:  # ours, or Pillow's own, for twice as many
        raise UserError(f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels: send a smaller one") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} {what_it_is(Path(path))}: send a JPEG, PNG, GIF, WebP, BMP or TIFF file") from error
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: correct the path") from error
    except IMAGE_ERRORS as error:
        raise UserError(f"{name} is broken ({first_line(error)}): send it again, or another picture") from error


def what_it_is(path: Path) -> str:
    """Says what a file is that is none of FORMATS."""
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        return "is empty (0 bytes)"
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        return "is a HEIC or AVIF picture, as phones take them, which cannot be read here"
    return "is not a picture"
