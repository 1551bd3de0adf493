"""Resizing of 8-bit pictures: Pillow's antialiased bicubic filter, computed by torch's uint8
kernels.

Those round weights to 16 bits where Pillow has 32, so that one value in 500 differs from Pillow's
by 1 of 255. Each axis is resized in a pass of its own, whose result is rounded to 8 bits; the order
of the passes is visible where values overshoot, and is Pillow's. For small reductions, two such
passes would make 5 values in a million differ by 2: there Pillow itself computes the first. (Of
large photographs one value in 100 million differs by 2.)
"""

import math

import numpy as np
from PIL import Image

from megatron_vita.media.images import Pixels, turned

LARGE_REDUCTION = 2.0
Color = tuple[int, int, int]
Size = tuple[int, int]
"""Width and height in pixels."""


def squashed(pixels: Pixels, size: Size) -> np.ndarray:
    """Resize the upright image to `size`, ignoring aspect ratio: uint8 `[3, size[1], size[0]]`."""
    # Resizing the stored image and turning the small result is faster. The passes are ordered as
    # if the image had been turned first, which gives the same values.
    sideways = pixels.orientation >= 5
    stored_size = size
    if sideways:
        stored_size = size[::-1]
    columns_first = _columns_first(pixels.size, size) != sideways
    return turned(
        _resize(pixels.stored, stored_size, columns_first=columns_first), pixels.orientation
    )


def letterboxed(pixels: Pixels, size: Size, color: Color) -> np.ndarray:
    """Fit the upright image into `size`, centred on one colour: uint8 `[3, size[1], size[0]]`."""
    width, height = fitting_size(pixels.size, size)
    canvas = np.empty((3, size[1], size[0]), dtype=np.uint8)
    canvas[:] = np.array(color, dtype=np.uint8)[:, None, None]
    left = (size[0] - width) // 2
    top = (size[1] - height) // 2
    canvas[:, top : top + height, left : left + width] = squashed(pixels, (width, height))
    return canvas


def fitting_size(size: Size, box: Size) -> Size:
    """Largest size within `box` of `size`'s aspect ratio, rounded up as by Hugging Face's
    LLaVA-NeXT."""
    wide = box[0] / size[0]
    high = box[1] / size[1]
    if wide < high:
        return box[0], min(math.ceil(size[1] * wide), box[1])
    return min(math.ceil(size[0] * high), box[0]), box[1]


def _columns_first(before: Size, after: Size) -> bool:
    """Return true if Pillow (13.0) resizes columns before rows."""
    gone = [old - new for old, new in zip(before, after, strict=True)]
    return gone[1] > 0 and gone[1] > 2 * gone[0]


def _resize(pixels: np.ndarray, size: Size, *, columns_first: bool) -> np.ndarray:
    """Resize uint8 `[height, width, 3]` to `[3, size[1], size[0]]`."""
    # here, since commands that resize nothing need not wait for torch
    import torch
    from torch.nn import functional

    height, width = pixels.shape[:2]
    between = (size[0], height)
    if columns_first:
        between = (width, size[1])
    if min(width / size[0], height / size[1]) < LARGE_REDUCTION:
        pixels = np.array(Image.fromarray(pixels).resize(between, Image.Resampling.BICUBIC))
    # Permuted like this the tensor is `channels_last`, down to its first stride, for which torch is
    # twice as fast.
    planes = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # [1,3,height,width]
    for shape in ((between[1], between[0]), (size[1], size[0])):
        planes = functional.interpolate(planes, size=shape, mode="bicubic", antialias=True)
    return planes[0].contiguous().numpy()
