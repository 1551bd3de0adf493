"""Folders of frame images, each a video, with captions: `clips/a/0001.jpg`, ... and `clips/a.txt`.

Video files with captions may be among them. A file `fps.txt` among the frames holds their rate.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.formats.base import Candidate, Setting, refuse
from data_tools.formats.captions import captioned
from data_tools.reading.frames import is_image
from megatron_vita.media.files import is_hidden
from megatron_vita.media.kinds import kind_of_name


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """Yield the subfolders with images, and the video files, of a folder; skips hidden ones."""
    for root, folders, names in os.walk(source):
        # In place: os.walk descends into what remains, in this order.
        folders[:] = sorted(folder for folder in folders if not is_hidden(folder))
        place = Path(root)
        if any(map(is_image, names)):
            yield Candidate(root, _of_frames(place, source, setting), 0)
            continue
        for name in sorted(names):
            if kind_of_name(name) == "video" and not is_hidden(name):
                make = partial(captioned, place / name, field="videos", setting=setting)
                yield Candidate(str(place / name), make, 0)


def _of_frames(folder: Path, source: Path, setting: Setting) -> Callable[[], dict[str, Any]]:
    """Return a `Candidate.make` for a folder of frames."""
    if folder == source:
        return refuse("the source itself holds images: name the folder above it")
    return partial(captioned, folder, field="videos", setting=setting)
