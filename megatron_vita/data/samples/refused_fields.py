"""Fields of third-party records that are understood, and refused: what they ask for is not done."""

import re
from collections.abc import Mapping
from typing import Any

from megatron_vita.data.samples.media_fields import is_filled
from megatron_vita.errors import DataError

_REFUSED = {
    **dict.fromkeys(
        ("kto_tag", "candidates"),
        "of preferences between answers only pairs are trained (rejected_response)",
    ),
    **dict.fromkeys(("tools", "functions"), "tools are not read"),
    "train_detail": "parts of a turn cannot be masked",
}
_PARTLY_TRAINED = re.compile(
    r"(loss|train|label)s?_?(mask|weight|scale|span)s?"
    r"|(assistant|response|completion|prompt|input)s?_(loss_)?masks?"
    r"|mask_(prompt|input|history|user)s?|train_on_(prompt|input|history|user)s?"
)
"""Fields that train a record otherwise than its answers as a whole."""
_ENDS_OF_VIDEO = re.compile(
    r"((video|clip|segment)_?)?(start|begin|end)(_?(time|sec|second|frame|idx|index|ts)s?|_s)?"
)
"""Fields that cut a part out of a video."""
_TURN_KEYS = ({"role", "content"}, {"from", "value"}, {"user", "assistant"})


def refuse_grades(fields: Mapping[str, Any]) -> None:
    """Raise DataError if a conversation is graded as good or bad."""
    if isinstance(fields.get("label"), bool):
        raise DataError(f"label is {fields['label']}: grades of answers are not trained here")


def refuse_what_is_not_learnt(fields: Mapping[str, Any]) -> None:
    """Refuse preferences, tools, and masks of parts of a record.

    Raises:
        DataError: naming the field.
    """
    for name, reason in _REFUSED.items():
        # Tables without lists write an empty list as text.
        if is_filled(fields.get(name)) and fields[name] != "[]":
            raise DataError(f"{name} is {fields[name]!r:.80}: {reason}")
    for name in ("loss", "train"):
        if fields.get(name) is False:
            raise DataError(f"{name} is False: the sample is not trained")
    refuse_partly_trained(fields)


def refuse_partly_trained(fields: Mapping[str, Any], where: str = "") -> None:
    """Refuse masks and weights of parts of a record or a turn.

    Raises:
        DataError: naming the field, after `where`.
    """
    for name, value in fields.items():
        if _PARTLY_TRAINED.fullmatch(str(name).lower()) and is_filled(value) and value is not False:
            raise DataError(
                f"{where}{name} is {value!r:.80}: turns are trained whole; give those that are not "
                '"loss": false (import has --ignore)'
            )


def refuse_parts_of_videos(fields: Mapping[str, Any], where: str = "") -> None:
    """Refuse the beginning and the end of a part of a video: videos are read whole.

    Raises:
        DataError: naming the field, after `where`.
    """
    for name, value in fields.items():
        # 0 is the beginning of the whole video.
        if _ENDS_OF_VIDEO.fullmatch(str(name).lower()) and is_filled(value) and value != 0:
            raise DataError(
                f"{where}{name} is {value!r:.80}: a video is used whole; cut the part out "
                "(import has --ignore)"
            )


def refuse_turns(fields: Mapping[str, Any]) -> None:
    """Raise DataError, naming the field, if a field that is not read holds turns."""
    for name, value in fields.items():
        first = None
        if isinstance(value, list) and value:
            first = value[0]
        if isinstance(first, Mapping) and any(keys <= first.keys() for keys in _TURN_KEYS):
            raise DataError(
                f"{name} holds turns, {value!r:.80}, in a field that is not read: name it "
                "messages, or leave it out (import has --ignore)"
            )
