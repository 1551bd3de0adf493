"""A film of 4,000 seconds to ask a server about: pages of text, some with a code."""

import io
import json
from pathlib import Path
from random import Random

import av
from PIL import Image

from examples.four_stages.films import needle_pages
from examples.four_stages.texts import TILE
from megatron_vita.files import atomic_write

FILM = "film.mp4"
QUESTIONS = "film.json"
SECONDS = 4000
CODES = 12
X264 = {"preset": "veryfast", "crf": "12", "g": "60"}  # letters stay sharp


def write_film(folder: Path, *, seconds: int = SECONDS) -> Path:
    """Write film.mp4, a frame a second, and film.json: a list of questions with their answers."""
    pages, turns = needle_pages("held-out", seconds, questions=CODES, draw=Random("film"))
    folder.mkdir(parents=True, exist_ok=True)
    asked = [{"question": question, "answer": answer} for question, answer in turns]
    (folder / QUESTIONS).write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    with atomic_write(folder / FILM) as partial:
        partial.write_bytes(_encoded(pages))
    return folder / FILM


def _encoded(pages: list[bytes]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options=X264)
        stream.width = TILE
        stream.height = TILE
        stream.pix_fmt = "yuv420p"
        for page in pages:
            with Image.open(io.BytesIO(page)) as image:
                frame = av.VideoFrame.from_image(image.convert("RGB"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
