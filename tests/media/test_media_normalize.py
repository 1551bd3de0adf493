"""Pixel values as the vision tower wants them."""

import pytest
import torch
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from megatron_vita.config.groups.media import NORMALIZATIONS
from megatron_vita.errors import ConfigError
from megatron_vita.media.normalization import NORMALIZATION, mean_color
from megatron_vita.media.normalize import normalize


def test_recipes_and_constants_know_the_same_kinds() -> None:
    assert tuple(NORMALIZATION) == NORMALIZATIONS


@pytest.mark.parametrize("kind", NORMALIZATION)
def test_values_are_scaled_and_then_standardised_channel_by_channel(kind: str) -> None:
    tiles = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8)
    normalized = normalize(tiles, kind)
    assert normalized.dtype == torch.float32
    mean, std = NORMALIZATION[kind]
    for channel in range(3):
        expected = (tiles[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(normalized[:, channel].double(), expected, rtol=1e-5, atol=1e-5)


def test_constants_are_those_of_hugging_face() -> None:
    clip = CLIPImageProcessorPil()
    siglip = SiglipImageProcessorPil()
    expected = {
        "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "clip": (clip.image_mean, clip.image_std),
        "siglip": (siglip.image_mean, siglip.image_std),
    }
    assert {kind: tuple(map(tuple, values)) for kind, values in expected.items()} == NORMALIZATION


@pytest.mark.parametrize(
    ("kind", "processor"), [("clip", CLIPImageProcessorPil), ("siglip", SiglipImageProcessorPil)]
)
def test_values_are_those_of_hugging_face(kind: str, processor: type) -> None:
    tiles = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    reference = processor(do_resize=False, do_center_crop=False)
    expected = reference(
        list(tiles.numpy()), return_tensors="pt", input_data_format="channels_first"
    )["pixel_values"]
    torch.testing.assert_close(normalize(tiles, kind), expected, rtol=1e-5, atol=1e-5)


def test_no_tiles_stay_no_tiles() -> None:
    assert normalize(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "clip").shape == (0, 3, 4, 4)


def test_the_mean_colour_is_rounded_down() -> None:
    assert mean_color("imagenet") == (123, 116, 103)
    assert mean_color("siglip") == (127, 127, 127)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'imagnet'; known: imagenet"):
        normalize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "imagnet")
