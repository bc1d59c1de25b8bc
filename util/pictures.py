"""Pictures that a stranger sends: what can be shown is opened, and of the rest a short line says why not."""

from pathlib import Path

from PIL import Image, ImageOps

from lavin.errors import UserError
from util.datasets import PICTURE_ERRORS

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow's others are rare, and some call other programs
MOST_PIXELS = 50_000_000  # 150 MB as RGB


def open_picture(path: str | Path) -> Image.Image:
    """The picture in RGB and upright (EXIF); of an animation, its first frame.

    Raises UserError where it is no picture, is cut off, or has more than MOST_PIXELS: that is known from its header.
    """
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise too_large(name)
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:  # Pillow's own limit, before we see the size
        raise too_large(name) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture: send a JPEG, PNG, GIF, WebP, BMP or TIFF file") from error
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: correct the path") from error
    except PICTURE_ERRORS as error:
        raise UserError(f"{name} is broken ({error}): send it again, or another picture") from error


def too_large(name: str) -> UserError:
    return UserError(f"{name} has more than {MOST_PIXELS // 1_000_000} million pixels: send a smaller one")
