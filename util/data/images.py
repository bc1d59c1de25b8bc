"""Pictures as the model takes them: RGB, upright, opaque, resized. Training, eval, MME and the chat open theirs here.

Pixels stay whole numbers: the ViT normalises them (lavin/vision.py).

The images of a ScienceQA split are all decoded before the first step, once a node (util/data/cache.py, by the content
of the files): a bad file is reported at the start, not an hour later, and no step waits for decoding. (Instruction
tuning has too many: it keeps a LazyImage of each, util/data/instructions.py.)
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image

from lavin.runtime.console import progress_bar
from lavin.runtime.distributed import all_gather_object
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import json_sha256, refuse_pipes, sha256
from lavin.tokenizer import Example
from util.data.cache import Arrays, cached
from util.data.checksums import file_sha256s, file_states, require_unchanged
from util.data.datasets import ScienceQA

# what Pillow raises on bad files
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)

# EXIF orientation -> what turns the picture upright. ImageOps.exif_transpose also rewrites EXIF, which fails where it
# is broken.
UPRIGHT = dict(enumerate([Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                          Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                          Image.Transpose.ROTATE_90], start=2))
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
# Pillow scales the pixels of these PNGs to 8 bits, but not the colour that their tRNS declares transparent
TRNS_SCALES = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}


def open_picture(path: str | Path, formats: tuple[str, ...] | None = None, max_pixels: float = float("inf")
                 ) -> Image.Image:
    """RGB, as a viewer on a white page shows it; of an animation, the first frame. Raises one of IMAGE_ERRORS."""
    refuse_pipes(Path(path))
    with Image.open(path, formats=formats) as image:
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"it has more than {max_pixels} pixels")
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: upright, transparency laid on white, the range of deeper greys kept. Opaque 8-bit pixels stay."""
    clear = transparent_colour(image)  # known only before the pixels are read
    image.load()
    orientation = exif_orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = Image.fromarray(to_8_bits(image, clear)).convert("RGB")
    elif clear is not None or image.mode == "P" or image.getbands()[-1] in ("A", "a"):
        rgb = on_white(image, clear)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # it holds no longer: with its EXIF, the next reader would turn the picture again
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of many types, on EXIF data that is broken; its picture is not
        return 1


def transparent_colour(image: Image.Image):
    """The grey, colour, palette index or palette alphas that a PNG's tRNS chunk or a GIF declares transparent."""
    clear = image.info.get("transparency")
    decoder = getattr(image, "tile", None)
    scale = TRNS_SCALES.get(str(decoder[0][3])) if decoder else None
    if clear is None or scale is None:
        return clear
    return tuple(int(value * scale) for value in clear) if isinstance(clear, tuple) else int(clear * scale)


def on_white(image: Image.Image, clear) -> Image.Image:
    if clear is not None:
        image.info["transparency"] = clear
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def to_8_bits(image: Image.Image, clear: int | None) -> np.ndarray:
    """Turns a grey picture of 16 or more bits into uint8 [H, W]."""
    values = np.asarray(image).astype(np.float64)
    white = white_level(image, values)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values  # Pillow does so only for 8 bits
    if clear is not None:
        values[values == clear] = white
    return np.round(values * (255 / white)).astype(np.uint8)


def white_level(image: Image.Image, values: np.ndarray) -> int:
    """The value of white: by the file's bit depth, or, where 32-bit integers and floats tell none, the first of 1 (for
    floats), 255 and 65535 that no value exceeds. Raises ValueError for values beyond.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        return 2 ** bits - 1
    if image.format in ("PNG", "PPM"):  # 16 bits, in Pillow's mode I
        return 65535
    levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    fitting = [level for level in levels if values.min() >= 0 and values.max() <= level]
    if not fitting:
        raise ValueError("its numbers are not between 0 and 65535: save it with 8 or 16 bits")
    return fitting[0]


def load_image(path: Path, size: int) -> torch.Tensor:
    """Reads a picture as uint8 [3, size, size], resized bicubically, without keeping the aspect ratio."""
    return image_to_tensor(open_picture(path), size)


def image_fault(error: Exception) -> str:
    """Says what is wrong with a picture that raised one of IMAGE_ERRORS."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"does not decode ({first_line(error)})"


def image_to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """Resizes a picture that is RGB, from open_picture, to uint8 [3, size, size]."""
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_images(data: ScienceQA, size: int, threads: int, skip_bad: bool) -> dict[str, torch.Tensor]:
    """All images of the split, by problem id, from the node's cache.

    An image that is missing or does not decode raises UserError. With skip_bad, its problem is removed from `data`
    instead.
    """
    paths = data.picture_paths
    files = list(paths.values())
    states, checksums = file_states(files), file_sha256s(files)

    def decode() -> Arrays:
        arrays = decode_all(files, size, threads, skip_bad)
        require_unchanged(states)
        return arrays

    arrays = cached("pictures", [sha256(Path(__file__)), PIL.__version__, size, checksums], decode,
                    {"pixels": (torch.uint8, (len(files), 3, size, size)), "good": (torch.bool, (len(files),))})
    images = {}
    for qid, image, is_good in zip(paths, arrays["pixels"], arrays["good"].tolist(), strict=True):
        try:
            images[qid] = image if is_good else load_image(paths[qid], size)  # the fault may have been temporary
        except IMAGE_ERRORS as error:
            if not skip_bad:
                raise bad_picture(paths[qid], error) from error
            data.bad_pictures.append(qid)
            del data.problems[qid]
    if not data.problems:
        raise UserError(f"no problem is left in {data.root}: all pictures are missing or broken")
    known = dict(zip(paths, checksums, strict=True))
    require_equal_ranks({qid: known.get(qid) for qid in data.problems}, "question")
    return images


def decode_all(paths: list[Path], size: int, threads: int, skip_bad: bool) -> Arrays:
    """Decodes pictures to pixels uint8 [number of paths, 3, size, size], and says which of them are good: with
    skip_bad, some may not be."""
    pixels = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8)
    good = torch.zeros(len(paths), dtype=torch.bool)

    def load(i: int) -> Exception | None:
        try:
            pixels[i] = load_image(paths[i], size)
        except IMAGE_ERRORS as error:
            return error
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        errors = progress_bar(pool.map(load, range(len(paths))), "pictures", total=len(paths), unit="picture")
        for i, error in enumerate(errors):
            good[i] = error is None
            if error and not skip_bad:
                pool.shutdown(cancel_futures=True)
                raise bad_picture(paths[i], error) from error
    return {"pixels": pixels, "good": good}


def bad_picture(path: Path, error: Exception) -> UserError:
    return UserError(f"picture {path} {image_fault(error)}: put it there, or leave such problems out with --skip_bad")


def require_equal_ranks(checksums: dict[str, str | None], what: str) -> None:
    """Raises UserError where processes have others left, or other pictures: they would take their samples from
    different lists.

    checksums: the names of what is left, each with the checksum of its picture; None where it has no picture.
    """
    left = list(checksums.items())
    if len(set(all_gather_object(json_sha256(left)))) == 1:
        return
    of_rank_0, *of_others = all_gather_object(left)
    rank, others = next((rank, others) for rank, others in enumerate(of_others, 1) if others != of_rank_0)
    example = min((name for name, _ in set(of_rank_0) ^ set(others)), default=of_rank_0[0][0])
    raise UserError(f"{what} {example}: rank 0 and rank {rank} differ in it, and have {len(of_rank_0):,} and "
                    f"{len(others):,} left: give all nodes the same pictures and problems")


# --- Pictures that are decoded in the step that needs them ---

@dataclass(unsafe_hash=True)
class LazyImage:
    """An Example's image that is not decoded yet. sha256: the checksum of its pixels, known since it was first
    decoded."""

    path: Path
    size: int
    sha256: bytes | None = field(default=None, compare=False)

    def decode(self) -> torch.Tensor:
        """uint8 [3, size, size]. Raises UserError where they are no longer those of the first time."""
        pixels = load_image(self.path, self.size)
        found = hashlib.sha256(pixels.numpy()).digest()
        if self.sha256 not in (None, found):
            raise UserError(f"{self.path} has changed since the run was started: put the picture back, and the same "
                            "command goes on")
        self.sha256 = found
        return pixels

    def problem(self) -> str | None:
        """Says what is wrong with the file; None where it decodes."""
        try:
            self.decode()
        except IMAGE_ERRORS as error:
            return image_fault(error)
        return None


def decode_images(examples: list[Example], threads: int = 4) -> list[Example]:
    """The examples with every LazyImage decoded; other images stay as they are."""
    lazy_images = {i: example.image for i, example in enumerate(examples) if isinstance(example.image, LazyImage)}
    if not lazy_images:
        return examples
    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = dict(zip(lazy_images, pool.map(LazyImage.decode, lazy_images.values()), strict=True))
    return [replace(example, image=decoded.get(i, example.image)) for i, example in enumerate(examples)]
