"""Documents: their length is known from metadata, labels stay inside them, tiles stand where they
belong."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vita.config import MediaConfig, TextConfig
from megatron_vita.config.groups.text import TEMPLATES
from megatron_vita.data.planning.token_counts import Lengths, document_lengths
from megatron_vita.data.samples.documents import Document, build_document, check_length
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.samples.records import parse_record
from megatron_vita.data.shards.index_build import build_index
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.errors import DataError
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.hugging_face import HuggingFaceTokenizer
from megatron_vita.text.media_tokens import MEDIA_FORMATS
from tests.data.toy_data import SIZES, World, write_shard
from tests.text.published import INTERNVL_TEMPLATE, byte_level_bpe


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("documents") / "a.tar", range(24))


def documents_of(shard: Path, encoder: SampleEncoder) -> Iterator[Document]:
    index = build_index(shard, encoder.chat)
    reader = ShardReader()
    for i in range(len(index)):
        row = index.row(i)
        data = reader.read(
            shard, member=row.members[f"{row.key}.json"], shard_size=index.header.shard_size
        )
        yield build_document(parse_record(data, row.key), row, encoder=encoder)


@pytest.fixture
def encoder(world: World) -> SampleEncoder:
    recipe = world.recipe
    return SampleEncoder(
        chat=ChatFormat(world.tokenizer), media=recipe.media, vision=recipe.model.vision
    )


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("max_tiles", [1, 6, 12])
@pytest.mark.parametrize(("max_fps", "max_frames"), [(0.1, 9), (4.0, 3), (8.0, 100)])
def test_lengths_from_metadata_are_those_of_the_documents(
    shard: Path,
    encoder: SampleEncoder,
    template: Any,
    max_tiles: int,
    max_fps: float,
    max_frames: int,
) -> None:
    media = MediaConfig(max_tiles=max_tiles, max_fps=max_fps, max_frames=max_frames)
    chat = ChatFormat(encoder.tokenizer, TextConfig(template=template))
    encoder = replace(encoder, chat=chat, media=media)
    index = build_index(shard, encoder.chat)
    assert_counted(document_lengths(index, encoder=encoder), list(documents_of(shard, encoder)))


@pytest.mark.parametrize("overlong", ["", "drop_media", "cut"])
@pytest.mark.parametrize("media_format", MEDIA_FORMATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_lengths_are_known_for_every_template_and_media_format(
    shard: Path, encoder: SampleEncoder, template: Any, media_format: Any, overlong: Any
) -> None:
    special = (*MEDIA_FORMATS[media_format].special_tokens, "<|im_start|>", "<|im_end|>", "</s>")
    tokenizer = HuggingFaceTokenizer(
        byte_level_bpe(*special).to_str(), added=(), chat_template=INTERNVL_TEMPLATE
    )
    chat = ChatFormat(tokenizer, TextConfig(template=template, media_format=media_format))
    media = MediaConfig(max_tiles=6, max_fps=8.0, max_frames=12)
    encoder = replace(encoder, chat=chat, media=media)
    if overlong:
        encoder = replace(encoder, overlong=overlong, limit=100)
    index = build_index(shard, chat)
    lengths = document_lengths(index, encoder=encoder)
    assert_counted(lengths, list(documents_of(shard, encoder)))
    if overlong:
        assert (lengths.tokens <= 100).sum() > 0


def assert_counted(lengths: Lengths, documents: list[Document]) -> None:
    assert lengths.tokens.tolist() == [len(document) for document in documents]
    assert lengths.tiles.tolist() == [len(document.placements) for document in documents]
    assert lengths.tiles.tolist() == [
        sum(medium.num_tiles for medium in document.media) for document in documents
    ]
    assert lengths.loss_tokens.tolist() == [
        int((document.labels != IGNORED_LABEL).sum()) for document in documents
    ]


@pytest.mark.parametrize("policy", ["reject", "cut", "drop_media"])
@pytest.mark.parametrize("limit", [40, 60, 80, 110])
def test_what_is_left_of_long_documents_is_counted_from_metadata(
    shard: Path, encoder: SampleEncoder, policy: str, limit: int
) -> None:
    encoder = replace(encoder, limit=limit, overlong=policy)
    lengths = document_lengths(build_index(shard, encoder.chat), encoder=encoder)
    documents = list(documents_of(shard, encoder))
    assert_counted(lengths, documents)
    whole = [len(document) for document in documents_of(shard, replace(encoder, limit=0))]
    assert max(whole) > limit
    left = [
        len(document) for length, document in zip(whole, documents, strict=True) if length > limit
    ]
    assert policy != "reject" or min(left) > limit
    assert policy != "drop_media" or limit < 110 or max(left) <= limit


def test_dropping_media_keeps_all_text_and_as_many_frames_as_fit(
    shard: Path, encoder: SampleEncoder
) -> None:
    whole = list(documents_of(shard, encoder))[1]
    frame = encoder.video_tokens(1)
    left = list(
        documents_of(shard, replace(encoder, limit=len(whole) - frame, overlong="drop_media"))
    )[1]
    kept = [(medium.member, medium.num_tiles) for medium in left.media]
    # the last picture goes whole
    assert kept == [(medium.member, medium.num_tiles) for medium in whole.media[:2]]
    lost = sum(encoder.measure_image(size)[0] for size in [(90, 30)])
    fewer = list(
        documents_of(
            shard, replace(encoder, limit=len(whole) - lost - 2 * frame, overlong="drop_media")
        )
    )[1]
    clip = fewer.media[1]
    assert clip.num_tiles == whole.media[1].num_tiles - 2
    # evenly over the 2 s
    assert clip.times == [(i + 0.5) * 2.0 / clip.num_tiles for i in range(clip.num_tiles)]
    text = {
        encoder.tokenizer.special_id(f"<{kind}>")
        for kind in ("img", "/img", "vid", "/vid", "patch", "/patch")
    }
    assert np.isin(fewer.input_ids, list(text)).sum() < np.isin(whole.input_ids, list(text)).sum()
    assert (fewer.labels != IGNORED_LABEL).sum() == (whole.labels != IGNORED_LABEL).sum()


def test_a_label_is_the_next_token_of_an_answer(shard: Path, encoder: SampleEncoder) -> None:
    tokenizer = encoder.tokenizer
    for number, document in enumerate(documents_of(shard, encoder)):
        scored = np.flatnonzero(document.labels != IGNORED_LABEL)
        assert (document.labels[scored] == document.input_ids[scored + 1]).all()
        answers = tokenizer.decode(document.labels[scored].tolist(), skip_special=False)
        if number % 4 == 3:
            assert answers == f"It is {2 * number}. " * (1 + number % 5) + "<|im_end|>\n"
        elif number % 5 == 1:
            assert answers == "A clip.<|im_end|>\nYes, <image> is a tag.<|im_end|>\n"


def test_the_first_token_of_an_answer_is_predicted_from_the_prompt(
    shard: Path, encoder: SampleEncoder
) -> None:
    for document in documents_of(shard, encoder):
        first = np.flatnonzero(document.labels != IGNORED_LABEL)[0]
        before = encoder.tokenizer.decode(
            document.input_ids[: first + 1].tolist(), skip_special=False
        )
        assert before.endswith("<|im_start|>assistant\n")


def test_placements_point_at_each_tile_s_placeholders(shard: Path, encoder: SampleEncoder) -> None:
    contexts = {
        encoder.tokenizer.special_id(f"<{kind}_CONTEXT>") for kind in ("IMG", "VID", "PATCH")
    }
    length = encoder.vision.image_token_length
    for document in documents_of(shard, encoder):
        holds = np.isin(document.input_ids, list(contexts))
        expected = [place + i for place in document.placements for i in range(length)]
        assert np.flatnonzero(holds).tolist() == expected


def test_media_come_in_the_order_of_the_conversation(shard: Path, encoder: SampleEncoder) -> None:
    document = list(documents_of(shard, encoder))[1]
    members = [medium.member for medium in document.media]
    assert members == ["s0001.image0.png", "s0001.video0.mp4", "s0001.image1.jpg"]
    assert document.media[0].grid == (2, 1)
    assert SIZES[1] == (200, 100)


def test_a_document_that_is_not_as_planned_is_named_with_both_numbers(
    shard: Path, encoder: SampleEncoder
) -> None:
    document = next(documents_of(shard, encoder))
    tokens = len(document)
    with pytest.raises(
        DataError,
        match=rf"x\.tar sample k: .*{tokens} tokens and 3 tiles, the plan counted 7 and 2",
    ):
        check_length(document, name="x.tar sample k", tokens=7, tiles=2)
