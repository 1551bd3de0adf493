"""Limits of single requests and of all requests together."""

import math
from dataclasses import dataclass

from megatron_vita.config.parsing.fields import check_fields, described


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server. A request beyond one is rejected early, with a 4xx status that names it."""

    open_requests: int = described(
        64, "Open requests, waiting or running; more get status 429.", gt=0
    )
    open_requests_per_key: int = described(
        32, "Open requests per API key, if the server has several; more get status 429.", gt=0
    )
    open_bodies: int = described(
        64,
        "Request bodies read at a time; beyond it the client with most of them loses its oldest.",
        gt=0,
    )
    body_bytes: int = described(64 << 20, "Bytes of a request body, including data URLs.", gt=0)
    media_files: int = described(64, "Images and videos per request.", gt=0)
    media_bytes: int = described(
        256 << 20, "Bytes of all images and videos of a request together.", gt=0
    )
    image_pixels: int = described(
        50_000_000, "Pixels of an image or video frame, by its header.", gt=0
    )
    video_frames: int = described(4096, "Frames sampled per video.", gt=0)
    prompt_tokens: int = described(
        1 << 20, "Tokens of a prompt, including those of its images and videos.", gt=0
    )
    output_tokens: int = described(
        4096, "Tokens of an output, also if the request sets no limit or a higher one.", gt=0
    )
    choices: int = described(8, "Outputs (n) or beams per request.", gt=0)
    header_seconds: float = described(
        20.0, "Seconds to receive the headers of a request.", gt=0, lt=math.inf
    )
    body_seconds: float = described(
        60.0, "Seconds to receive the body of a request.", gt=0, lt=math.inf
    )
    request_seconds: float = described(
        600.0, "Seconds from the start of a request to the end of its response.", gt=0, lt=math.inf
    )
    drain_seconds: float = described(
        20.0, "Seconds for open requests to finish during shutdown.", gt=0, lt=math.inf
    )
    fetch_seconds: float = described(
        30.0, "Seconds to download a remote image or video.", gt=0, lt=math.inf
    )

    def __post_init__(self) -> None:
        # Times are finite: an infinite limit would be none.
        check_fields(self, "the limit ")

    @property
    def text_characters(self) -> int:
        """Most characters of text that are tokenized: 8 per prompt token. English has 4 to 5."""
        return 8 * self.prompt_tokens
