"""Mean and standard deviation of pixel values, by the names that recipes give them."""

from collections.abc import Sequence

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


def mean_color(kind: Normalization) -> tuple[int, int, int]:
    """Mean as an 8-bit colour, rounded down, for the padding of letterboxed frames."""
    red, green, blue = (min(max(int(v * 255), 0), 255) for v in mean_and_deviation(kind)[0])
    return red, green, blue


def mean_and_deviation(kind: Normalization) -> tuple[Color, Color]:
    """Return mean and standard deviation of each color of a normalization."""
    if not isinstance(kind, str):
        mean, deviation = kind
        return mean, deviation
    if kind not in NORMALIZATION:
        raise ConfigError(f"normalization is {kind!r}; known: {', '.join(NORMALIZATION)}")
    return NORMALIZATION[kind]
