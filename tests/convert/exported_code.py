"""Opening of an export with the modelling files in it, as its users do."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    dynamic_module_utils,
)

from tests.convert.asked_of_transformers import Inputs, Question


@functools.cache
def _own_cache() -> None:
    """Copies of modelling files in a folder of this process, not in the home folder."""
    dynamic_module_utils.HF_MODULES_CACHE = tempfile.mkdtemp()


def opened_with_code(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model in fp32 and processor of an export."""
    _own_cache()
    trusted: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **trusted)
    return model.eval(), AutoProcessor.from_pretrained(folder, **trusted)


def of_export(processor: ProcessorMixin, question: Question, *, videos: Path) -> Inputs:
    """Prompt ids and pixels of a question by an export's processor."""
    found = processor.apply_chat_template(
        _filled(question, videos),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return Inputs(found["input_ids"][0].tolist(), found.get("pixel_values"))


def _filled(question: Question, videos: Path) -> list[dict[str, Any]]:
    """Messages of a question with its images, and its videos as files in a folder."""
    images = iter(question.images)
    files = iter(question.videos)
    messages = []
    for message in question.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_medium(part, images=images, files=files, videos=videos) for part in content]
        messages.append(message | {"content": content})
    return messages


def _medium(part: dict[str, Any], *, images: Any, files: Any, videos: Path) -> dict[str, Any]:
    if part["type"] == "image":
        return part | {"image": next(images)}
    if part["type"] == "text":
        return part
    path = videos / f"{len(list(videos.iterdir()))}.mp4"
    path.write_bytes(next(files))
    return part | {"video": str(path)}
