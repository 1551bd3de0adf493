"""Documents: their length is known from metadata, labels stay inside them, tiles stand where they belong."""

from dataclasses import replace

import numpy as np
import pytest
from toy_data import SIZES, write_shard

from megatron_vita.config import MediaConfig
from megatron_vita.data.documents import (
    NO_LOSS,
    DocumentFormat,
    build_document,
    check_length,
    document_lengths,
    newline_length,
)
from megatron_vita.data.index import build_index
from megatron_vita.data.shards import ShardReader, parse_record
from megatron_vita.errors import DataError


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory):
    return write_shard(tmp_path_factory.mktemp("documents") / "a.tar", range(24))


def documents_of(shard, form: DocumentFormat):
    index, reader = build_index(shard, form.tokenizer, form.template), ShardReader()
    for i in range(len(index)):
        row = index.row(i)
        data = reader.read(shard, member=row.members[f"{row.key}.json"], shard_size=index.header.shard_size)
        yield build_document(parse_record(data, row.key), row, form=form)


@pytest.fixture
def form(world) -> DocumentFormat:
    recipe = world.recipe
    return DocumentFormat(tokenizer=world.tokenizer, template="chatml", media=recipe.media, vision=recipe.model.vision)


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("max_tiles", [1, 6, 12])
@pytest.mark.parametrize(("max_fps", "max_frames"), [(0.1, 9), (4.0, 3), (8.0, 100)])
def test_lengths_from_metadata_are_those_of_the_documents(
    shard, form, template: str, max_tiles: int, max_fps: float, max_frames: int
) -> None:
    media = MediaConfig(max_tiles=max_tiles, max_fps=max_fps, max_frames=max_frames)
    form = replace(form, template=template, media=media)
    index = build_index(shard, form.tokenizer, template)
    newline = newline_length(form.tokenizer)
    tokens, tiles = document_lengths(index, media=media, vision=form.vision, newline_length=newline)
    documents = list(documents_of(shard, form))
    assert tokens.tolist() == [len(document) for document in documents]
    assert tiles.tolist() == [len(document.placements) for document in documents]
    assert tiles.tolist() == [sum(medium.num_tiles for medium in document.media) for document in documents]


def test_a_label_is_the_next_token_of_an_answer(shard, form) -> None:
    tokenizer = form.tokenizer
    for number, document in enumerate(documents_of(shard, form)):
        scored = np.flatnonzero(document.labels != NO_LOSS)
        assert (document.labels[scored] == document.input_ids[scored + 1]).all()
        answers = tokenizer.decode(document.labels[scored].tolist(), skip_special=False)
        if number % 4 == 3:
            assert answers == f"It is {2 * number}. " * (1 + number % 5) + "<|im_end|>\n"
        elif number % 5 == 1:
            assert answers == "A clip.<|im_end|>\nYes, <image> is a tag.<|im_end|>\n"


def test_the_first_token_of_an_answer_is_predicted_from_the_prompt(shard, form) -> None:
    for document in documents_of(shard, form):
        first = np.flatnonzero(document.labels != NO_LOSS)[0]
        before = form.tokenizer.decode(document.input_ids[: first + 1].tolist(), skip_special=False)
        assert before.endswith("<|im_start|>assistant\n")


def test_placements_point_at_each_tile_s_placeholders(shard, form) -> None:
    contexts = {form.tokenizer.special_id(f"<{kind}_CONTEXT>") for kind in ("IMG", "VID", "PATCH")}
    length = form.vision.image_token_length
    for document in documents_of(shard, form):
        holds = np.isin(document.input_ids, list(contexts))
        expected = [place + i for place in document.placements for i in range(length)]
        assert np.flatnonzero(holds).tolist() == expected


def test_media_come_in_the_order_of_the_conversation(shard, form) -> None:
    document = list(documents_of(shard, form))[1]
    members = [medium.member for medium in document.media]
    assert members == ["s0001.image0.png", "s0001.video0.mp4", "s0001.image1.jpg"]
    assert document.media[0].grid == (2, 1)
    assert SIZES[1] == (200, 100)


def test_a_document_that_is_not_as_planned_is_named_with_both_numbers(shard, form) -> None:
    document = next(documents_of(shard, form))
    tokens = len(document)
    with pytest.raises(DataError, match=rf"x\.tar sample k: .*{tokens} tokens and 3 tiles, the plan counted 7 and 2"):
        check_length(document, name="x.tar sample k", tokens=7, tiles=2)
