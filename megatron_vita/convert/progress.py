"""How far a conversion is: bytes, rate and time left."""

from typing import TextIO

from tqdm import tqdm


class Progress:
    """A bar on the terminal."""

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
        """So many bytes more are done."""
        self._bar.update(nbytes)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
