"""Progress of a conversion: bytes, rate and remaining time."""

from typing import TextIO

from tqdm import tqdm


class ProgressBar:
    """Progress bar on the terminal."""

    def __init__(self, title: str, *, nbytes: int, stream: TextIO | None = None) -> None:
        self._bar = tqdm(
            total=nbytes,
            desc=title,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=stream,
            mininterval=0.5,
        )

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more bytes as done."""
        self._bar.update(nbytes)

    def close(self) -> None:
        """End the bar and leave it on the terminal."""
        self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
