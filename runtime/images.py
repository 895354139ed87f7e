"""A JPEG or PNG becomes the bytes of an image model's input.

Decodes no more than the model needs (a JPEG at the nearest scale that its DCT gives for free), converts to grey or
RGB, resizes, and looks every pixel up in a table that holds what the manifest's normalisation and the tensor's
quantisation make of each of its 256 values; there is no floating-point image. Everything a picture may do to this
process is capped: its bytes, its pixels, the formats, and how many are decoded at once.

`BadImage` is for whoever sent the picture; its message says what is wrong with it. An orientation in EXIF is not
applied: training pipelines do not apply it either.
"""

import io
import os
import threading
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from protocol.manifest import Preprocess, Resize, TensorSpec
from runtime.preprocess import quantise

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_IMAGE = 16 * 1024 * 1024  # bytes of one encoded picture
MAX_PIXELS = 25_000_000  # decoding one as PNG takes up to 4 bytes each
FORMATS = ("JPEG", "PNG")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_LONGEST_MAGIC = max(map(len, _MAGIC))
_RGB = 3  # channels
# Decoding keeps a core busy and takes memory: more at once than there are cores only takes more memory.
_DECODING = threading.BoundedSemaphore(os.cpu_count() or 1)


class BadImage(ValueError):
    """The bytes are not a picture that is taken here."""


def is_image(data: bytes | bytearray | memoryview) -> bool:
    """Tell whether data begins as a JPEG or PNG does."""
    return bytes(data[:_LONGEST_MAGIC]).startswith(_MAGIC)


@final
class ImageReader:
    """Makes one image model's input of pictures. Safe to use from several threads."""

    def __init__(self, spec: TensorSpec, preprocess: Preprocess) -> None:
        """``spec``: the loaded model's input, NHWC with 1 or 3 channels; the manifest was checked for that."""
        _, self._height, self._width, channels = spec.shape
        self._mode = "RGB" if channels == _RGB else "L"
        self._resize = preprocess.resize
        self._tables = _tables(spec, preprocess)

    def read(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return one picture as the tensor takes it; raise `BadImage`."""
        if len(data) > MAX_IMAGE:
            raise BadImage(f"the image has {len(data)} bytes, at most {MAX_IMAGE} are accepted")
        if not is_image(data):
            raise BadImage("the data is neither a JPEG nor a PNG")
        with _DECODING:
            pixels = self._decode(data)
        return self._look_up(pixels).tobytes()

    def _decode(self, data: bytes | bytearray | memoryview) -> npt.NDArray[np.uint8]:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check(picture)
                return np.asarray(self._fit(picture), np.uint8)
        except BadImage:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage(f"the image has more than {MAX_PIXELS} pixels") from error
        except Exception as error:  # decoders raise nearly anything on damaged pictures
            raise BadImage(f"the image cannot be decoded: {error}") from error

    def _fit(self, picture: "Picture") -> "Picture":
        """Return the picture in the model's size and colours."""
        from PIL import Image

        picture.draft(self._mode, self._draft_size(*picture.size))
        box = self._box(*picture.size)
        whole = picture if picture.mode == self._mode else picture.convert(self._mode)
        return whole.resize((self._width, self._height), Image.Resampling.BILINEAR, box=box)

    def _draft_size(self, width: int, height: int) -> tuple[int, int]:
        """Return how large the picture must be decoded at least, so that what is kept of it has enough pixels."""
        left, top, right, bottom = self._box(width, height)
        return (
            max(1, round(self._width * width / (right - left))),
            max(1, round(self._height * height / (bottom - top))),
        )

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of the picture that is kept."""
        if self._resize is Resize.STRETCH:
            return 0, 0, width, height
        factor = min(width / self._width, height / self._height)
        kept_width, kept_height = self._width * factor, self._height * factor
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        return left, top, min(width, left + kept_width), min(height, top + kept_height)

    def _look_up(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        if len(self._tables) == 1:  # grey, or the same for every channel
            return self._tables[0][pixels]
        planes = [table[pixels[:, :, channel]] for channel, table in enumerate(self._tables)]
        return np.stack(planes, axis=-1)


def _check(picture: "Picture") -> None:
    """Raise `BadImage` for a picture that must not be decoded; only its header has been read."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"the image has {width} x {height} pixels, at most {MAX_PIXELS} are accepted")
    if picture.format == "PNG" and getattr(picture, "is_animated", False):
        raise BadImage("the image is animated; one frame is expected")
    if picture.mode.startswith(("I", "F")):
        raise BadImage("the image has 16 bits a channel, 8 are expected")


def _tables(spec: TensorSpec, preprocess: Preprocess) -> list[npt.NDArray[Any]]:
    """Return the tensor's value of each pixel value: one table a channel, or one for all where they are equal."""
    channels = list(zip(preprocess.mean, preprocess.scale, strict=True))
    pixels = np.arange(256, dtype=np.float64)
    tables = channels[:1] if len(set(channels)) == 1 else channels
    return [quantise((pixels - mean) * scale, spec) for mean, scale in tables]
