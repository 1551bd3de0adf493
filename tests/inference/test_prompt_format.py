"""Prompts have the format of training: the folder's own template, and InternVL's media."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vita import platform
from megatron_vita.config import Recipe, TextConfig
from megatron_vita.data.datasets import sample_encoder
from megatron_vita.data.samples.documents import build_document
from megatron_vita.data.samples.records import parse_record
from megatron_vita.data.shards.index_build import build_index
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.errors import ConfigError
from megatron_vita.inference.engine.engine import Engine, EngineOptions
from megatron_vita.inference.requests.prompt import MediaFile, Prompt, prepare_prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.media.video import probe_video
from megatron_vita.text.vocabulary import open_tokenizer
from tests.inference.tiny import picture, tiny_recipe, video
from tests.text.published import FAMILIES, save_family

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "hello <video> and <image>"},
    {"role": "assistant", "content": "It sat"},
]


def published_recipe(folder: Path, family: str) -> Recipe:
    save_family(folder / family, family)
    text = TextConfig(
        tokenizer=str(folder / family), template="jinja", media_format="internvl", date="2026-01-31"
    )
    return tiny_recipe(folder).replaced({"text": text, "model.language.vocab_size": 480})


@pytest.mark.parametrize("family", ["qwen2.5", "llama3.2", "internvl-hf"])
def test_a_prompt_is_the_beginning_of_the_trained_document(tmp_path: Path, family: str) -> None:
    recipe = published_recipe(tmp_path, family)
    encoder = sample_encoder(recipe, open_tokenizer(recipe))
    images = [picture(1, (40, 20)), picture(2, (16, 16))]
    film = video(2)
    shard = tmp_path / "a.tar"
    with SampleWriter(shard) as writer:
        media = {
            "image": [ShardMedia(".png", image.data) for image in images],
            "video": [ShardMedia(".mp4", film.data)],
        }
        writer.write("s", record={"messages": TALK}, media=media)
    index = build_index(shard, encoder.chat)
    row = index.row(0)
    record = ShardReader().read(
        shard, member=row.members["s.json"], shard_size=index.header.shard_size
    )
    trained = build_document(parse_record(record, "s"), row, encoder=encoder)
    asked = prepare_prompt(
        Prompt(messages=TALK[:3], images=images, videos=[film]),
        encoder=encoder,
        probe=lambda file: probe_video(file.data, file.name),
    ).document
    assert trained.input_ids[: len(asked)].tolist() == asked.input_ids.tolist()
    assert trained.placements.tolist() == asked.placements.tolist()
    assert [medium.grid for medium in trained.media] == [medium.grid for medium in asked.media]
    last = trained.labels[len(asked) - 1 :]
    answer = encoder.tokenizer.decode(last[last != IGNORED_LABEL].tolist(), skip_special=False)
    assert answer == "It sat" + FAMILIES[family].end_of_turn


def test_an_engine_ends_answers_where_the_origin_does_and_takes_images(tmp_path: Path) -> None:
    platform.initialize_process()
    recipe = published_recipe(tmp_path, "internvl-hf")
    recipe = recipe.replaced({"text.stop_tokens": ["</img>"]})
    small = EngineOptions(chunk_tokens=64, busy_chunk_tokens=64, page_tokens=4, cache_tokens=2048)
    engine = Engine(recipe, options=small)
    tokenizer = engine.tokenizer
    ends = ("<|im_end|>", "<|endoftext|>", "</img>")
    assert engine.end_ids == {tokenizer.special_id(name) for name in ends}
    prompt = Prompt.ask("What is this?", images=[picture(1, (64, 16))], videos=[video(2)])
    (answer,) = engine.generate(
        [prompt], sampling=SamplingParams(max_new_tokens=4, ignore_eos=True)
    )
    assert len(answer.token_ids) == 4
    asked = tokenizer.decode(engine.prepare(prompt).document.input_ids.tolist(), skip_special=False)
    assert "</img>\nFrame1: <img>" in asked
    assert asked.endswith("</img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n")
    engine.close()


def test_an_engine_refuses_at_the_start_what_its_tokenizer_lacks(tmp_path: Path) -> None:
    platform.initialize_process()
    recipe = published_recipe(tmp_path, "qwen2")
    recipe = recipe.replaced({"text.stop_tokens": ["<|eot_id|>"]})
    with pytest.raises(
        ConfigError, match=r"stop_tokens names '<\|eot_id\|>', which is not a token"
    ):
        Engine(recipe)


def test_a_prompt_asks_its_question_on_a_line_after_its_media() -> None:
    png = MediaFile(name="a.png", data=b"")
    (message,) = Prompt.ask("<image> what?", images=[png]).messages
    assert message["content"] == [{"type": "image"}, {"type": "text", "text": "<image> what?"}]
