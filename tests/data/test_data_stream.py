"""The stream: a pack's number gives its Batch, the same for any share of tiles and any number of
workers."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vita.data.loading import stream as stream_module
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.samples.encoding import Medium
from megatron_vita.errors import DataError
from megatron_vita.layout.slicing import IGNORED_LABEL
from tests.data.toy_data import COLORS, World, assert_same, changed, damage, train_stream


def test_a_pack_is_always_full_length_and_its_documents_tile_it(world: World) -> None:
    stream = train_stream(world)
    keys = []
    for pack in range(len(stream)):
        batch = stream[pack]
        starts = batch.cu_seqlens
        assert batch.pack_id == pack
        assert batch.input_ids.shape == batch.labels.shape == (256,)
        assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert (starts.dtype, starts[0], starts[-1]) == (torch.int32, 0, 256)
        assert (starts % 16 == 0).all()
        assert (starts.diff() > 0).all()
        assert torch.equal(starts, batch.document_starts)
        assert len(batch.document_sources) == len(starts) - 1
        assert len(batch.sample_keys) == (batch.document_sources >= 0).sum()
        assert batch.tiles.dtype == torch.uint8
        assert batch.tiles.shape == (len(batch.placements), 3, 28, 28)
        assert batch.num_tokens == sum(entry.tokens for entry in stream.plan.pack(pack))
        keys += batch.sample_keys
    assert sorted(keys) == [f"s{i:04d}" for i in range(40)]


def test_joined_documents_follow_each_other_without_padding_and_are_one_segment(
    world: World,
) -> None:
    recipe = changed(world.recipe, data={"isolate_documents": False})
    plan, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    apart = train_stream(world)
    stream = PackStream(
        plan,
        shards=apart._shards,
        indexes=apart._indexes,
        contents=apart._contents,
        data=recipe.data,
        encoders=apart.encoders,
        tile_share=(0, 1),
    )
    for pack in range(len(stream)):
        batch = stream[pack]
        lengths = plan.lengths_of(pack).tolist()
        assert batch.cu_seqlens.tolist() == [0, 256]
        assert batch.document_starts.diff().tolist()[: len(lengths)] == lengths
        assert batch.document_starts[-1] == 256
        for start in batch.document_starts[1:-1].tolist():
            assert batch.labels[start - 1] == IGNORED_LABEL


def test_padding_and_tail_carry_no_loss_and_no_label_crosses_documents(world: World) -> None:
    stream = train_stream(world)
    tails = 0
    for pack in range(len(stream)):
        batch = stream[pack]
        entries = stream.plan.pack(pack)
        for i, (start, stop) in enumerate(
            zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
        ):
            used = entries[i].tokens if i < len(entries) else 0
            assert (batch.labels[start + max(used - 1, 0) : stop] == IGNORED_LABEL).all()
            assert (batch.input_ids[start + used : stop] == world.tokenizer.pad_id).all()
            tails += i == len(entries)
        assert batch.document_sources.tolist()[: len(entries)] == [
            entry.dataset for entry in entries
        ]
        assert batch.document_sources.tolist()[len(entries) :] in ([], [-1])
    assert tails


def test_placements_count_from_the_start_of_the_pack(world: World) -> None:
    stream = train_stream(world)
    special = world.tokenizer.special_id
    for pack in range(len(stream)):
        batch = stream[pack]
        opening = torch.isin(
            batch.input_ids,
            torch.tensor([special(f"<{kind}>") for kind in ("img", "vid", "patch")]),
        )
        assert torch.equal(torch.nonzero(opening)[:, 0] + 1, batch.placements)


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_ranks_tiles_joined_are_all_tiles(world: World, ranks: int) -> None:
    whole = train_stream(world)
    shares = [train_stream(world, (rank, ranks)) for rank in range(ranks)]
    for pack in range(len(whole)):
        batches = [share[pack] for share in shares]
        assert sorted(torch.cat([batch.tile_ids for batch in batches]).tolist()) == list(
            range(len(whole[pack].tiles))
        )
        for batch in batches:
            assert torch.equal(batch.tiles, whole[pack].tiles[batch.tile_ids])
            assert torch.equal(batch.placements, whole[pack].placements)
            assert torch.equal(batch.input_ids, whole[pack].input_ids)


def test_tiles_are_those_of_their_placeholders(world: World) -> None:
    stream = train_stream(world)
    colors = dict(
        zip(
            COLORS,
            [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 165, 0), (128, 0, 128)],
            strict=True,
        )
    )
    checked = 0
    for pack in range(len(stream)):
        batch = stream[pack]
        for key, start in zip(batch.sample_keys, batch.document_starts.tolist(), strict=False):
            number = int(key[1:])
            if number % 4 == 3 or number % 5 == 1:
                continue
            tile = torch.searchsorted(batch.placements, start)
            corner = batch.tiles[tile, :, -1, -1].tolist()
            assert np.allclose(corner, colors[COLORS[number % 5]], atol=2)
            checked += 1
    assert checked > 15


def test_a_rank_without_a_vision_tower_decodes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "decode_tiles", None)
    stream = train_stream(world, None)
    batches = [stream[pack] for pack in range(len(stream))]
    assert all(batch.tiles.shape == (0, 3, 28, 28) for batch in batches)
    assert sum(len(batch.placements) for batch in batches) == stream.plan.columns["tiles"].sum()


def test_few_media_are_opened_by_two_ranks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    decode = stream_module.decode_tiles

    def counting(medium: Medium, data: bytes, *, name: str, tiles: range, **options: Any) -> Any:
        opened.append(name)
        assert tiles
        return decode(medium, data, name=name, tiles=tiles, **options)

    monkeypatch.setattr(stream_module, "decode_tiles", counting)
    shares = [train_stream(world, (rank, 3)) for rank in range(3)]
    for pack in range(len(shares[0])):
        opened.clear()
        for share in shares:
            share[pack]
        for kind in ("image", "video"):
            of_kind = [name for name in opened if f".{kind}" in name]
            assert len(of_kind) - len(set(of_kind)) <= 2


def test_a_damaged_sample_is_named_by_shard_and_key(own_world: World) -> None:
    name = damage(own_world)
    stream = train_stream(own_world)
    with pytest.raises(DataError, match=rf"more-000000\.tar.*{name.split('.')[0]}"):
        [stream[pack] for pack in range(len(stream))]


def test_an_index_that_disagrees_with_the_plan_is_named_with_both_numbers(world: World) -> None:
    stream = train_stream(world)
    tokens = stream.plan.pack(0)[0].tokens
    stream.plan.columns["tokens"] = stream.plan.columns["tokens"] + 3
    with pytest.raises(
        DataError, match=rf"\.tar sample s\d+: .*has {tokens} tokens .*counted {tokens + 3}"
    ):
        stream[0]


def test_a_stream_can_be_sent_to_another_process(world: World) -> None:
    stream = train_stream(world, (0, 2))
    stream[0]
    assert_same(pickle.loads(pickle.dumps(stream))[1], stream[1])
