"""The processor that exports carry reads media from every kind of source alike, honours or refuses
each option, and tells transformers where it has put placeholders."""

import base64
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vita.convert.exported.processing_vita import VitaProcessor
from tests.convert.published import TILE
from tests.convert.published_models import ROWS
from tests.media.picture_files import file_of, photograph
from tests.media.video_files import clip
from tests.text.published import save_family

TAGGED = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ part.text }}{% endgeneration %}{% else %}{{ part.text }}{% endif %}"
    "{% else %}<{{ part.type }}>{% endif %}{% endfor %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> VitaProcessor:
    tokenizer = save_family(tmp_path_factory.mktemp("tokenizer"), "qwen2.5")
    return VitaProcessor(tokenizer, tile_size=TILE, image_seq_length=ROWS)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    path.write_bytes(clip(frames=100))  # 4 seconds
    return path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Address of a server of the files in `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def pixels(processor: VitaProcessor, image: Any) -> torch.Tensor:
    return processor(images=image, text="<image>")["pixel_values"]


def half_clear() -> Image.Image:
    """Image with a transparent half, whose hidden color is not white."""
    image = photograph((TILE, TILE)).convert("RGBA")
    image.paste((9, 99, 9, 0), (0, 0, TILE // 2, TILE))
    return image


def test_transparency_is_the_same_from_every_source(
    processor: VitaProcessor, served: str, tmp_path: Path
) -> None:
    data = file_of(half_clear(), "PNG")
    (tmp_path / "clear.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    expected = pixels(processor, half_clear())
    sources = (
        *(text, f"data:image/png;base64,{text}", base64.encodebytes(data).decode()),
        *(f"{served}/clear.png", tmp_path / "clear.png", str(tmp_path / "clear.png")),
    )
    for source in sources:
        assert torch.equal(pixels(processor, source), expected), str(source)[:60]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_images_are_refused_in_base64_too(mode: str, processor: VitaProcessor) -> None:
    data = file_of(Image.new(mode, (9, 9)), "TIFF")
    with pytest.raises(ValueError, match=f"an image of mode {mode} is given"):
        pixels(processor, base64.b64encode(data).decode())


def test_sources_that_cannot_be_read_are_named(
    processor: VitaProcessor, served: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"missing\.png: the image cannot be read: .*404"):
        pixels(processor, f"{served}/missing.png")
    with pytest.raises(ValueError, match=r"missing\.png: the image cannot be read"):
        pixels(processor, tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"cat\.png: is no file, no http address"):
        pixels(processor, "cat.png")
    with pytest.raises(ValueError, match="Cats: the image cannot be read"):
        pixels(processor, "Cats")


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({}, 4),
        ({"fps": 2}, 8),
        ({"videos_kwargs": {"fps": 2}}, 8),
        ({"videos_kwargs": {"num_frames": 3}, "images_kwargs": {}}, 3),
        ({"fps": 2, "num_frames": 5, "do_sample_frames": True}, 5),
        ({"fps": None, "num_frames": None}, 4),
    ],
)
def test_options_of_sampling_are_read_wherever_they_stand(
    options: dict[str, Any], frames: int, processor: VitaProcessor, video: Path
) -> None:
    found = processor(videos=str(video), text="<video>", **options)
    assert len(found["pixel_values"]) == frames


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tiles": 2}, "max_tiles: the processor has no such option"),
        ({"max_fps": 2, "max_frames": 3}, "max_fps, max_frames: the processor has no"),
        ({"images_kwargs": {"max_tiles": 2}}, "max_tiles: images_kwargs has no such option"),
        ({"videos_kwargs": {"max_frames": 2}}, "max_frames: videos_kwargs has no such option"),
        ({"text_kwargs": {"pading": True}}, "pading: text_kwargs has no such option"),
        ({"pading": True}, "pading: the processor has no such option"),
        ({"fps": 0}, "fps is 0: a number above 0"),
        ({"videos_kwargs": {"num_frames": -1}}, "num_frames is -1: a number above 0"),
        ({"do_sample_frames": False}, "a file is always sampled"),
    ],
)
def test_options_without_effect_are_refused(
    options: dict[str, Any], said: str, processor: VitaProcessor, video: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        processor(videos=str(video), text="<video>", **options)


def test_frames_that_are_given_are_not_sampled(processor: VitaProcessor) -> None:
    frames = [photograph((TILE, TILE), seed) for seed in range(3)]
    found = processor(videos=frames, text="<video>", do_sample_frames=False)
    assert len(found["pixel_values"]) == 3
    with pytest.raises(ValueError, match="frames that are given are all taken"):
        processor(videos=frames, text="<video>", fps=1)


def turn(role: str, text: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": [*media, {"type": "text", "text": text}]}


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_masks_of_the_assistant_s_tokens_stand_behind_media(
    tensors: str | None, processor: VitaProcessor
) -> None:
    image = {"type": "image", "image": photograph((3 * TILE + 20, TILE))}
    frames = {"type": "video", "video": [photograph((TILE, TILE), seed) for seed in range(2)]}
    conversations = [
        [turn("user", "What?", image), turn("assistant", "A cat."), turn("user", "And?", frames),
         turn("assistant", "Two mats.")],
        [turn("user", "hello"), turn("assistant", "Yes")],
    ]  # fmt: skip
    found = processor.apply_chat_template(
        conversations,
        chat_template=TAGGED,
        tokenize=True,
        return_dict=True,
        return_tensors=tensors,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    said = []
    for ids, mask in zip(found["input_ids"], found["assistant_masks"], strict=True):
        marked = [int(index) for index, one in zip(ids, mask, strict=True) if one]
        said.append(processor.decode(marked))
    assert said == ["A cat.Two mats.", "Yes"]
