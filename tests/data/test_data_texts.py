"""Raw text: loss on every token, split over packs where it is longer than one."""

from pathlib import Path

import numpy as np
import pytest

from megatron_vita.data.loading import stream
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.shards.tar import SampleWriter
from tests.data.toy_data import World, toy_recipe
from tests.indexes import index_shard

LENGTH = 256


@pytest.fixture
def texts(world: World) -> dict[str, tuple[str, list[int]]]:
    """Texts and their token ids by key; of one token, just a pack, one token more, and several
    packs."""
    ids = {}
    words = ["It", "is", "red.", "How", "much", "is", "seven?", "A", "clip.", ""]
    for key, length in {
        "one": 2,
        "pack": LENGTH,
        "more": LENGTH + 1,
        "book": 5 * LENGTH + 17,
        "tome": 9 * LENGTH,
    }.items():
        text = ""
        for i in range(10_000):
            longer = text + words[i % len(words)] + " "
            if len(world.tokenizer.encode(longer)) >= length:
                break
            text = longer
        while len(world.tokenizer.encode(text)) < length - 1:
            text += "#"
        ids[key] = (
            text,
            [*world.tokenizer.encode(text), world.tokenizer.special_id("<|endoftext|>")],
        )
        assert len(ids[key][1]) == length
    return ids


@pytest.fixture
def packs(world: World, texts: dict[str, tuple[str, list[int]]], tmp_path: Path) -> PackStream:
    shard = tmp_path / "shapes-000000.tar"
    with SampleWriter(shard) as writer:
        for key, (text, _) in texts.items():
            writer.write(key, record={"text": text}, media={})
    index_shard(shard, world.tokenizer)
    recipe = toy_recipe(
        tmp_path, train=[{"name": "shapes", "shards": str(shard)}], validation=[], seq_length=LENGTH
    )
    write_plan(make_plan(recipe, "train", tokenizer=world.tokenizer)[0], plan_path(recipe, "train"))
    return open_split(recipe, split="train", tokenizer=world.tokenizer, tile_share=(0, 1))


def parts_of(packs: PackStream) -> dict[str, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Start, token ids and labels of each part of each text."""
    found: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for pack_id in range(len(packs)):
        batch = packs[pack_id]
        entries = packs.plan.pack(pack_id)
        for key, first, entry in zip(
            batch.sample_keys, batch.document_starts.tolist(), entries, strict=False
        ):
            where = slice(first, first + entry.tokens)
            found.setdefault(key, []).append(
                (entry.start, batch.input_ids[where].numpy(), batch.labels[where].numpy())
            )
    return {key: sorted(parts, key=lambda part: part[0]) for key, parts in found.items()}


@pytest.mark.parametrize("kept_bytes", [1 << 20, 6 * LENGTH * 16, 0])
def test_every_token_of_a_text_is_in_one_pack_and_predicts_the_next(
    packs: PackStream,
    texts: dict[str, tuple[str, list[int]]],
    kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "LONG_TEXT_BYTES", kept_bytes)
    packs._open_caches()
    found = parts_of(packs)
    assert found.keys() == texts.keys()
    for key, (_, ids) in texts.items():
        starts, inputs, labels = zip(*found[key], strict=True)
        assert list(starts) == list(range(0, len(ids), LENGTH))
        assert np.concatenate(inputs).tolist() == ids
        assert np.concatenate(labels).tolist() == [*ids[1:], -100]
    assert packs.plan.columns["rows"].sum() == sum(len(ids) - 1 for _, ids in texts.values())


def test_a_long_text_is_tokenized_once_for_all_its_packs(
    packs: PackStream,
    texts: dict[str, tuple[str, list[int]]],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[str] = []
    tokenizer = type(packs.encoders[0].tokenizer)
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text)
    )
    parts_of(packs)
    assert sorted(encoded) == sorted(text for text, _ in texts.values())
