"""Opens uploaded images, which may be broken, huge or no images at all."""

import os
import stat
from pathlib import Path

from PIL import Image, ImageOps

from lavin.runtime.errors import UserError
from util.data.images import IMAGE_ERRORS

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow's others are rare, and some run external programs
MAX_PIXELS = 50_000_000  # 150 MB as RGB


def open_image(path: str | Path) -> Image.Image:
    """The image in RGB, turned upright (EXIF); of an animation, its first frame.

    Raises UserError where the file is no image, is truncated, or its header announces more than MAX_PIXELS.
    """
    name = Path(path).name
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{name} is no file but a folder or device: name a picture")  # a named pipe would hang
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise too_large(name)
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:  # Pillow's own limit, applied before the size can be read
        raise too_large(name) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture: send a JPEG, PNG, GIF, WebP, BMP or TIFF file") from error
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: correct the path") from error
    except IMAGE_ERRORS as error:
        raise UserError(f"{name} is broken ({error}): send it again, or another picture") from error


def too_large(name: str) -> UserError:
    return UserError(f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels: send a smaller one")
