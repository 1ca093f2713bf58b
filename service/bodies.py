"""Images from the bodies of requests, within limits, and what the API does to them before the encoder.

Whatever a body says of its sizes is checked before memory is taken for it: headers of arrays and pictures come first,
JSON is not parsed before its brackets are counted, and nothing is unpickled.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_aug.folders import in_rgb, resize
from service.refusal import Refusal
from settings import Settings, setting
from utils import UserError

LARGEST_SIDE = 4096  # pixels
MOST_PIXELS = 2**27  # of all pictures of a request: a small file may decode to a large picture
NPY, PNG, JPEG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# The beginnings of what bodies of a type may hold.
KINDS = {
    "application/x-npy": (NPY,),
    "image/png": (PNG, JPEG),
    "image/jpeg": (PNG, JPEG),
    "multipart/form-data": (PNG, JPEG),
    "application/json": (PNG, JPEG, NPY),
}


@dataclass(frozen=True)
class Limits(Settings):
    """How much a request may be."""

    max_batch: int = setting(1000, "the most images in a request", at_least=1, at_most=100_000)
    max_body: int = setting(64, "the most MiB in the body of a request", at_least=1, at_most=2048)
    patience: float = setting(30.0, "seconds within which a body has to arrive", above=0)
    title = "limits"


@dataclass(frozen=True)
class Preprocessing(Settings):
    """What the API does to images before the encoder, which normalises them itself."""

    resize: int | None = setting(
        None,
        "take images of any size, and resize the centre square of each to N x N pixels",
        at_least=1,
        at_most=LARGEST_SIDE,
        otherwise="images of another size than the victim's are refused",
    )
    crop: int | None = setting(
        None, "then cut out the N x N pixels in the middle", at_least=1, at_most=LARGEST_SIDE, otherwise="not cut"
    )
    jpeg_quality: int | None = setting(
        None,
        "then compress them as JPEG of this quality, and read that",
        at_least=1,
        at_most=100,
        otherwise="not compressed",
    )
    title = "images"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop and self.resize and self.crop > self.resize:
            raise UserError(f"--crop {self.crop} is more than --resize {self.resize} leaves: lower it")

    @property
    def shown(self) -> dict[str, Any]:
        """What buyers are told."""
        return {**asdict(self), "normalisation": "unknown"}

    def __call__(self, images: Tensor) -> Tensor:
        """The images (B, 3, H, W), uint8 or float in [0, 1], as the encoder gets them."""
        if self.resize and images.shape[-2:] != (self.resize, self.resize):
            images = _resized(_cut(images, min(images.shape[-2:])), self.resize)
        if self.crop:
            images = _cut(images, self.crop)
        if self.jpeg_quality:
            images = torch.stack([_compressed(image, self.jpeg_quality) for image in images])
        return images


def _cut(images: Tensor, side: int) -> Tensor:
    """The square in the middle; images that are smaller are left as they are."""
    top, left = (max(0, extent - side) // 2 for extent in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _resized(images: Tensor, size: int) -> Tensor:
    if images.dtype == torch.uint8:
        return resize(images, size)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)


def _compressed(image: Tensor, quality: int) -> Tensor:
    levels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return _as_tensor(Image.open(file).convert("RGB"))


def _as_tensor(picture: Image.Image) -> Tensor:
    """A picture in RGB as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@dataclass(frozen=True)
class Reader:
    """Makes images of bodies. size: the side of images where they are not resized."""

    preprocessing: Preprocessing
    size: int
    limits: Limits = Limits()

    def read(self, media_type: str, parts: Sequence[bytes]) -> Tensor:
        """The images (B, 3, S, S) of a request as the encoder gets them, uint8 or float32 in [0, 1].

        parts: the body, or of multipart/form-data the files. Refusal says what is wrong with them.
        """
        kinds = KINDS[media_type]
        if media_type == "application/json":
            parts = self._unpack_json(parts[0])
        self._check_count(len(parts))
        made, pixels = [], 0
        for images in (self._read_part(part, kinds) for part in parts):
            pixels += images.shape[0] * images.shape[2] * images.shape[3]
            if pixels > MOST_PIXELS:
                raise Refusal(413, "too_large", f"more than {MOST_PIXELS:,} pixels", "send fewer or smaller images")
            made.append(self.preprocessing(images))
            self._check_count(sum(map(len, made)))
        if len({images.dtype for images in made}) > 1:
            raise _bad_array("the images are partly uint8 and partly float32", "send one type in a request")
        return torch.cat(made)

    def _check_count(self, count: int) -> None:
        if not count:
            raise Refusal(400, "bad_request", "there is no image", f"send 1 to {self.limits.max_batch} images")
        if count > self.limits.max_batch:
            remedy = f"send at most {self.limits.max_batch} images in a request"
            raise Refusal(413, "too_large", f"the request has {count} images", remedy)

    def _check_size(self, height: int, width: int) -> None:
        if self.preprocessing.resize is None and (height, width) != (self.size, self.size):
            said = f"the images are {height} x {width} pixels, not {self.size} x {self.size}"
            raise Refusal(400, "bad_image", said, f"resize them to {self.size} x {self.size}")
        if max(height, width) > LARGEST_SIDE:
            said = f"an image of {height} x {width} pixels"
            raise Refusal(413, "too_large", said, f"send images of at most {LARGEST_SIDE} pixels a side")

    def _unpack_json(self, body: bytes) -> list[bytes]:
        """The parts of {"images": [...]}."""
        remedy = 'send {"images": ["<base64 of a PNG, JPEG or npy file>", ...]}'
        # Base64 has no brackets and no commas. A body of brackets alone would become gigabytes of lists.
        if body.count(b"[") + body.count(b"{") > 2:
            raise Refusal(400, "bad_request", "the JSON has further lists or objects", remedy)
        self._check_count(body.count(b",") + 1)
        try:
            content = json.loads(body)
            if not isinstance(content, dict) or content.keys() != {"images"} or not isinstance(content["images"], list):
                raise ValueError("it has no list `images`, or other keys")
            return [base64.b64decode(text, validate=True) for text in content["images"]]
        except (ValueError, TypeError, RecursionError) as error:
            raise Refusal(400, "bad_request", f"the JSON cannot be read: {str(error)[:100]}", remedy) from None

    def _read_part(self, part: bytes, kinds: Sequence[bytes]) -> Tensor:
        """The images (b, 3, H, W) in a file."""
        kind = next((kind for kind in kinds if part.startswith(kind)), None)
        if kind is None:
            code = "bad_array" if kinds == (NPY,) else "bad_image"
            wanted = " or ".join({NPY: "an npy array", PNG: "a PNG", JPEG: "a JPEG"}[kind] for kind in kinds)
            raise Refusal(400, code, "the data do not begin as those of their type", f"send {wanted}")
        return self._read_array(part) if kind == NPY else self._read_picture(part)

    def _read_picture(self, part: bytes) -> Tensor:
        try:
            with Image.open(io.BytesIO(part), formats=("PNG", "JPEG")) as file:
                self._check_size(file.height, file.width)
                return _as_tensor(in_rgb(file))[None]
        except Refusal:
            raise
        except Exception as error:  # broken files make PIL's decoders raise nearly anything
            said = f"a picture cannot be read: {' '.join(str(error).split())[:100]}"
            raise Refusal(400, "bad_image", said, "send whole PNG or JPEG files") from None

    def _read_array(self, part: bytes) -> Tensor:
        shape, dtype, start = _npy_header(part)
        if dtype not in (np.dtype("uint8"), np.dtype("<f4")):
            raise _bad_array(f"the array is {str(dtype)[:40]}", "send uint8, or float32 in [0, 1]")
        shape = (1, *shape) if len(shape) == 3 else shape
        if len(shape) != 4 or 3 not in (shape[1], shape[3]) or min(shape) < 1:
            raise _bad_array(f"the array's shape is {str(shape)[:60]}", "send (B, 3, H, W) or (B, H, W, 3)")
        if math.prod(shape) * dtype.itemsize != len(part) - start:
            raise _bad_array("the array's data are not as long as its shape says", "send the whole npy file")
        last = shape[1] != 3
        self._check_size(*(shape[1:3] if last else shape[2:]))
        images = torch.from_numpy(np.frombuffer(part, dtype, offset=start).reshape(shape).copy())
        images = images.permute(0, 3, 1, 2) if last else images
        # Written so that a number that is not a number fails too.
        if images.is_floating_point() and not (images.amin() >= 0 and images.amax() <= 1):
            raise Refusal(422, "bad_numbers", "float images are not all in [0, 1]", "divide by 255, without NaN")
        return images


def _npy_header(part: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """The shape and type of an npy file, and where its data begin."""
    file = io.BytesIO(part)
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[np.lib.format.read_magic(file)](file, max_header_size=1000)
    except Exception:  # a header is Python's literals, and errors of its tokenizer and parser are many
        raise _bad_array("the array's header cannot be read", "send a file that numpy.save has written") from None
    if fortran and len(shape) > 1:
        raise _bad_array("the array is in Fortran's order", "send numpy.ascontiguousarray of it")
    return shape, dtype, file.tell()


def _bad_array(message: str, remedy: str) -> Refusal:
    return Refusal(400, "bad_array", message, remedy)
