"""transformers' processor of InternVL where torchvision is not installed.

AutoProcessor needs torchvision for its class of video processors, and for no other reason. Here
frames are resized and normalized by the image processor of the same settings, whole as the video
processor takes them.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GotOcr2ImageProcessorPil, InternVLProcessor, PreTrainedTokenizerFast


class WithoutTorchvision(InternVLProcessor):
    """InternVL's processor, whose videos are arrays of frames, uint8 [frames, height, width, 3]."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """Take any video processor."""

    def _process_videos(self, videos: Any, **_: Any) -> tuple[dict[str, Any], list[str]]:
        pixels = [
            self.image_processor(
                [Image.fromarray(frame) for frame in frames],
                crop_to_patches=False,
                return_tensors="np",
            )["pixel_values"]
            for frames in videos
        ]
        inputs = {"pixel_values_videos": torch.from_numpy(np.stack(pixels))}
        return inputs, [self.replace_video_token(inputs, place) for place in range(len(videos))]


def internvl_processor(
    tokenizer: PreTrainedTokenizerFast, *, tile: int, rows: int, **settings: Any
) -> WithoutTorchvision:
    """The processor of a tokenizer with InternVL's names of special tokens: tiles of `tile` pixels
    with `rows` placeholders each; `settings` are the image processor's."""
    usual = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    images = GotOcr2ImageProcessorPil(size={"height": tile, "width": tile}, **(usual | settings))
    return WithoutTorchvision(
        images, tokenizer, object(), image_seq_length=rows, chat_template=tokenizer.chat_template
    )
