"""Normalization of pixel values."""

import functools
from collections.abc import Sequence

import torch

from megatron_vita.errors import ConfigError

Color = Sequence[float]
Normalization = str | Sequence[Color]
"""Name of a normalization, or [mean, standard deviation], each of red, green and blue."""

NORMALIZATION: dict[str, tuple[Color, Color]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue, on a scale of 0 to 1."""
TILES_AT_ONCE = 32


def normalize(
    tiles: torch.Tensor, kind: Normalization, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normalize uint8 tiles `[n, 3, S, S]` to `dtype`: `(tiles / 255 - mean) / std`.

    The result has the same shape and device.
    """
    # In float32 and some tiles at a time: a bf16 result needs no room for float32 of all tiles.
    mean, std = _constants_on(tiles.device, *map(tuple, _constants(kind)))
    normalized = torch.empty(tiles.shape, dtype=dtype, device=tiles.device)
    for part, source in zip(
        normalized.split(TILES_AT_ONCE), tiles.split(TILES_AT_ONCE), strict=True
    ):
        part.copy_((source.to(torch.float32) / 255 - mean) / std)
    return normalized


# Cached, since a copy to the device waits for the work queued there.
@functools.cache
def _constants_on(
    device: torch.device, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation as [3, 1, 1] tensors on a device."""
    shape = (3, 1, 1)
    return (
        torch.tensor(mean, device=device).view(shape),
        torch.tensor(deviation, device=device).view(shape),
    )


def mean_color(kind: Normalization) -> tuple[int, int, int]:
    """Mean as an 8-bit colour, rounded down, for the padding of letterboxed frames."""
    red, green, blue = (min(max(int(v * 255), 0), 255) for v in _constants(kind)[0])
    return red, green, blue


def _constants(kind: Normalization) -> tuple[Color, Color]:
    if not isinstance(kind, str):
        mean, deviation = kind
        return mean, deviation
    if kind not in NORMALIZATION:
        raise ConfigError(f"normalization is {kind!r}; known: {', '.join(NORMALIZATION)}")
    return NORMALIZATION[kind]
