"""Limits of single requests and of all requests together."""

import dataclasses
import math
from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server. A request beyond one is rejected early, with a 4xx status that names it."""

    open_requests: int = described(
        64, "Requests that wait or are answered at a time; more get status 429."
    )
    open_requests_per_key: int = described(
        32, "The same of one API key, where there are several; more get status 429."
    )
    open_bodies: int = described(
        64, "Bodies that are read at a time; then the client with most of them loses its oldest."
    )
    body_bytes: int = described(64 << 20, "Bytes of a request's body, data URLs in it included.")
    media_files: int = described(64, "Images and videos of one request.")
    media_bytes: int = described(
        256 << 20, "Bytes of all images and videos of one request together."
    )
    image_pixels: int = described(
        50_000_000, "Pixels of an image, or of a video's frame, by its header."
    )
    video_frames: int = described(4096, "Frames taken from one video.")
    prompt_tokens: int = described(
        1 << 20, "Tokens of one prompt, those of its images and videos included."
    )
    output_tokens: int = described(
        4096, "Tokens of one answer, also where a request names no number or a higher one."
    )
    choices: int = described(8, "Answers (n) or beams of one request.")
    header_seconds: float = described(
        20.0, "Seconds in which the headers of a request must have come."
    )
    body_seconds: float = described(60.0, "Seconds in which the body of a request must have come.")
    request_seconds: float = described(
        600.0, "Seconds from the start of a request to the end of its answer."
    )
    drain_seconds: float = described(
        20.0, "Seconds that open requests get to end when the server is told to stop."
    )
    fetch_seconds: float = described(
        30.0, "Seconds in which a remote image or video must have come."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                # Also refuses NaN, which any comparison would let pass.
                math.isfinite(value) and value > 0,
                f"the limit {field.name} is {value}: it must be positive",
            )

    @property
    def text_characters(self) -> int:
        """Most characters of text that are tokenized: 8 per prompt token. English has 4 to 5."""
        return 8 * self.prompt_tokens
