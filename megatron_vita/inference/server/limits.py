"""Limits of single requests and of all requests together."""

import dataclasses
import math
from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server. A request beyond one is rejected early, with a 4xx status that names it."""

    open_requests: int = described(64, "Open requests, waiting or running; more get status 429.")
    open_requests_per_key: int = described(
        32, "Open requests per API key, if the server has several; more get status 429."
    )
    open_bodies: int = described(
        64,
        "Request bodies read at a time; beyond it the client with most of them loses its oldest.",
    )
    body_bytes: int = described(64 << 20, "Bytes of a request body, including data URLs.")
    media_files: int = described(64, "Images and videos per request.")
    media_bytes: int = described(256 << 20, "Bytes of all images and videos of a request together.")
    image_pixels: int = described(50_000_000, "Pixels of an image or video frame, by its header.")
    video_frames: int = described(4096, "Frames sampled per video.")
    prompt_tokens: int = described(
        1 << 20, "Tokens of a prompt, including those of its images and videos."
    )
    output_tokens: int = described(
        4096, "Tokens of an output, also if the request sets no limit or a higher one."
    )
    choices: int = described(8, "Outputs (n) or beams per request.")
    header_seconds: float = described(20.0, "Seconds to receive the headers of a request.")
    body_seconds: float = described(60.0, "Seconds to receive the body of a request.")
    request_seconds: float = described(
        600.0, "Seconds from the start of a request to the end of its response."
    )
    drain_seconds: float = described(20.0, "Seconds for open requests to finish during shutdown.")
    fetch_seconds: float = described(30.0, "Seconds to download a remote image or video.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                # An infinite limit would be none.
                math.isfinite(value) and value > 0,
                f"the limit {field.name} is {value}: it must be positive",
            )

    @property
    def text_characters(self) -> int:
        """Most characters of text that are tokenized: 8 per prompt token. English has 4 to 5."""
        return 8 * self.prompt_tokens
