"""Normalisation of pixel values."""

import functools

import torch

from megatron_vita.media.normalization import Normalization, mean_and_deviation

TILES_AT_ONCE = 32


def normalize(
    tiles: torch.Tensor, kind: Normalization, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normalize uint8 tiles `[n, 3, S, S]` to `dtype`: `(tiles / 255 - mean) / std`.

    The result has the same shape and device.
    """
    # In float32 and some tiles at a time: a bf16 result needs no room for float32 of all tiles.
    mean, std = _constants_on(tiles.device, *map(tuple, mean_and_deviation(kind)))
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
