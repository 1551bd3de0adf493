"""Folders of frame images, each a video, with a caption beside it: `clips/a/0001.jpg`, ... and
`clips/a.txt`.

A file `fps.txt` among the frames holds their rate.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools.formats.base import Candidate, Setting
from data_tools.formats.captions import captioned
from data_tools.frames import is_image
from megatron_vita.media.files import is_hidden


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The folders in a folder that hold images; hidden ones are passed over."""
    for root, folders, names in os.walk(source):
        folders[:] = sorted(folder for folder in folders if not is_hidden(folder))
        if any(map(is_image, names)) and Path(root) != source:
            yield Candidate(
                root, partial(captioned, Path(root), field="videos", setting=setting), 0
            )
