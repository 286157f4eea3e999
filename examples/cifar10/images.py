# An image file, PNG or JPEG, as the bytes that the networks here are trained on.

import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from command import DataError, shown
from PIL import Image, ImageOps

MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # of at most 8 bits a channel


@contextmanager
def opened(path: Path):
    """
    The image, whose pixels are not decoded yet. Whatever Pillow raises of the file, here or within,
    is a DataError that names it, and so is an image of more pixels than Pillow's limit.
    """
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{shown(path)}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG", "JPEG"]) as image:  # no other decoder is tried
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise DataError(f"{shown(path)}: more pixels than the {limit} that are decoded") from None
    except DataError:
        raise
    except Exception as error:  # decoders raise errors of many kinds
        why = getattr(error, "strerror", None)
        reason = f"cannot be read: {why}" if why else "cannot be decoded as PNG or JPEG"
        raise DataError(f"{shown(path)}: {reason}") from None


def decode(path: Path, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: upright, its middle at this aspect, and resized."""
    with opened(path) as image:
        if image.mode not in MODES:
            raise DataError(f"{shown(path)}: {image.mode} pixels, expected 8 bits a channel")
        image.draft("RGB", (2 * width, 2 * height))  # a JPEG: not larger than we need
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
        image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        return np.asarray(image)
