"""Image decoding and resizing.

The images of a ScienceQA split are all decoded before the first step: a bad file is reported at the start, not an hour
later, and no step waits for decoding. (Instruction tuning has too many: util/data/instructions.py.)
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lavin.runtime.console import progress_bar
from lavin.runtime.errors import UserError, first_line
from util.data.datasets import ScienceQA

IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files


def load_image(path: Path, size: int) -> torch.Tensor:
    """uint8 [3, size, size]; resized bicubically, without keeping the aspect ratio."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")  # opening a named pipe would wait for ever
    with Image.open(path) as image:
        return image_to_tensor(image, size)


def image_fault(error: Exception) -> str:
    """What is wrong with a picture that raised one of IMAGE_ERRORS."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"does not decode ({first_line(error)})"


def image_to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_images(data: ScienceQA, size: int, threads: int, skip_bad: bool) -> dict[str, torch.Tensor]:
    """All images of the split, by problem id.

    An image that is missing or does not decode raises UserError. With skip_bad, its problem is removed from `data`
    instead.
    """
    paths = {qid: path for qid in data.problems if (path := data.picture_path(qid))}
    images = {}

    def load(item):
        try:
            return item[0], load_image(item[1], size), None
        except IMAGE_ERRORS as error:
            return item[0], None, error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for qid, image, error in progress_bar(pool.map(load, paths.items()), "pictures", total=len(paths)):
            if error is None:
                images[qid] = image
            elif skip_bad:
                data.skipped.append(qid)
                del data.problems[qid]
            else:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"picture {paths[qid]} {image_fault(error)}: put it there, or leave such problems out "
                                "with --skip_bad")
    if not data.problems:
        raise UserError(f"no problem is left in {data.root}: all pictures are missing or broken")
    return images
