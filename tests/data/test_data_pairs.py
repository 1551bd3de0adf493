"""Pairs of a chosen and a rejected answer: whole in a pack, their conversations blind to one
another."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.statistics import collect_statistics
from data_tools.viewing.inspection import inspect_fault
from megatron_vita.config import Recipe
from megatron_vita.costs.flops import tile_flops, variable_cost
from megatron_vita.data.batch import collate, mask_documents
from megatron_vita.data.datasets import sample_encoder
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.planning.plan import compare_stamps, write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.planning.token_counts import document_lengths
from megatron_vita.data.samples.documents import Document, blank_document, build_document
from megatron_vita.data.samples.records import parse_record
from megatron_vita.data.shards.index import read_index
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.errors import DataError
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.rounding import round_up
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.training.run.faults import FaultReport, FaultyPack, write_dump
from tests.data.toy_data import World, clip, picture, talk, toy_recipe
from tests.forked import run_program
from tests.indexes import index_of, index_shard

MEDIA = {"image": [ShardMedia(".png", picture((90, 180), "red"))]}
FILM = MEDIA | {"video": [ShardMedia(".mp4", clip())]}
SAMPLES: list[tuple[dict[str, Any], dict[str, list[ShardMedia]]]] = [
    (talk("<image>\nWhich colour?", "It is red.") | {"rejected_response": "Blue, as ever."}, MEDIA),
    (talk("One?", "One.", "And two?", "Two.") | {"rejected_response": "Three?", "weight": 0.5}, {}),
    (talk("<image> and <video>", "A clip.") | {"rejected_response": "A cat. " * 9}, FILM),
    (talk("How long?", "Long. " * 40) | {"rejected_response": "Short."}, {}),
]
ORDINARY = (talk("Plain?", "Plain."), dict[str, list[ShardMedia]]())


def write_pairs(root: Path, tokenizer: Tokenizer, *, more: bool = False) -> Recipe:
    """A shard of pairs, `more` with an ordinary sample; and a recipe that trains on them."""
    root.mkdir(exist_ok=True)
    with SampleWriter(root / "pairs-000000.tar") as writer:
        for i, (record, media) in enumerate([*SAMPLES, *([ORDINARY] if more else [])]):
            writer.write(f"p{i}", record=record, media=media)
    index_shard(root / "pairs-000000.tar", tokenizer)
    pairs = {"name": "pairs", "shards": f"{root}/pairs-*.tar"}
    frozen = [f"training.freeze_{part}" for part in ("vision_model", "projector", "language_model")]
    recipe = toy_recipe(root, train=[pairs], validation=[], seq_length=320)
    return recipe.replaced({"lora.rank": 2, "dpo.beta": 0.1} | dict.fromkeys(frozen, True))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> World:
    root = tmp_path_factory.mktemp("pairs")
    return World(root, write_pairs(root / "all", tokenizer, more=True), tokenizer)


def documents_in(world: World) -> list[Document]:
    encoder = sample_encoder(world.recipe, world.tokenizer, dataset=world.recipe.data.train[0])
    shard = world.root / "all" / "pairs-000000.tar"
    index = read_index(index_of(shard))
    reader = ShardReader()
    documents = []
    for i in range(len(index)):
        row = index.row(i)
        member = row.members[f"{row.key}.json"]
        data = reader.read(shard, member=member, shard_size=index.header.shard_size)
        document = build_document(parse_record(data, row.key), row, encoder=encoder)
        lengths = document_lengths(index, encoder=encoder)
        assert len(document) == lengths.tokens[i]
        assert len(document.placements) == lengths.tiles[i]
        assert (document.labels != IGNORED_LABEL).sum() == lengths.loss_tokens[i]
        assert lengths.is_pair[i] == row.is_pair == (i < len(SAMPLES))
        blank = blank_document(
            row, tokens=len(document), tiles=len(document.placements), encoder=encoder
        )
        assert blank.rejected_start == document.rejected_start
        documents.append(document)
    return documents


def test_a_pair_is_two_conversations_with_loss_on_their_last_answers(pairs: World) -> None:
    decode = pairs.tokenizer.decode
    *documents, ordinary = documents_in(pairs)
    assert ordinary.rejected_start == 0
    for (record, media), document in zip(SAMPLES, documents, strict=True):
        start = document.rejected_start
        assert start % 16 == 0
        halves = [slice(0, start), slice(start, len(document))]
        answers = (record["messages"][-1]["content"], record["rejected_response"])
        for half, answer in zip(halves, answers, strict=True):
            labels = document.labels[half]
            scored = labels[labels != IGNORED_LABEL]
            assert decode(scored.tolist()).startswith(answer)
            inside = (document.placements >= half.start) & (document.placements < half.stop)
            assert inside.sum() * 2 == len(document.placements)
            assert labels[-1] == IGNORED_LABEL
        question = [document.input_ids[half][:8].tolist() for half in halves]
        assert question[0] == question[1]
        names = [medium.member for medium in document.media]
        count = sum(map(len, media.values()))
        assert names[:count] == names[count:]
        assert len(names) == 2 * count
    assert documents[1].weight == 0.5


def test_both_answers_of_a_pair_lie_in_one_pack_and_see_themselves_alone(
    tmp_path: Path, pairs: World
) -> None:
    recipe = pairs.recipe.replaced({"data.plan": str(tmp_path / "plan")})
    plan, left_out = make_plan(recipe, "train", tokenizer=pairs.tokenizer)
    assert [(entry.key, entry.reason) for entry in left_out] == [
        ("p4", "has no rejected answer (rejected_response), which dpo.beta needs")
    ]
    write_plan(plan, plan_path(recipe, "train"))
    stream = open_split(recipe, split="train", tokenizer=pairs.tokenizer, tile_share=(0, 1))
    seen = []
    for pack_id in range(len(stream)):
        batch = stream[pack_id]
        seen += batch.sample_keys
        assert batch.rejected_starts is not None
        bounds = {*batch.document_starts.tolist(), *batch.rejected_starts.tolist()}
        assert batch.cu_seqlens.tolist() == sorted(bounds)
        inside = zip(
            batch.rejected_starts, batch.document_starts, batch.document_starts[1:], strict=False
        )
        assert all(start < rejected < stop for rejected, start, stop in inside)
        lengths = batch.cu_seqlens.diff().tolist()
        assert batch.conversation_lengths == lengths[: 2 * len(batch.sample_keys)]
    assert sorted(seen) == ["p0", "p1", "p2", "p3"]


DRY_RUN = """
import json, pickle, sys
from pathlib import Path
from megatron_vita.training.dry_run import dry_run

report = dry_run(pickle.loads(Path(sys.argv[1]).read_bytes()), world_size=1)
print(json.dumps([[pack.segments, len(pack.lengths)] for pack in report.packs]))
"""


def segments_of_a_dry_run(recipe: Recipe, folder: Path) -> list[tuple[list[int], int]]:
    """Attention segments and number of documents of each pack, from a process of its own: a dry run
    makes a world."""
    (folder / "recipe.pickle").write_bytes(pickle.dumps(recipe))
    ended = run_program("-c", DRY_RUN, str(folder / "recipe.pickle"))
    assert ended.returncode == 0, ended.stderr
    packs: list[tuple[list[int], int]] = json.loads(ended.stdout)
    assert packs
    return packs


def test_a_pair_costs_two_conversations_and_its_faults_count_pairs(
    tmp_path: Path, pairs: World, tokenizer_path: Path
) -> None:
    files = {"data.plan": str(tmp_path / "plan"), "text.tokenizer": str(tokenizer_path)}
    fields = {
        "training.eval_interval": 0,
        "training.global_batch_size": 1,
        "training.train_iters": 1,
    }
    recipe = pairs.recipe.replaced(files | fields)
    plain = recipe.replaced({"dpo.beta": 0.0})
    apart = variable_cost(plain, [32, 32, 16, 16], tiles=0)
    tiles = variable_cost(plain, [], tiles=3) + 3 * tile_flops(recipe.model)
    # The reference adds a forward pass to the three of training, and sees the tiles once more.
    assert variable_cost(recipe, [64, 32], tiles=3) == apart * 4 // 3 + tiles
    assert variable_cost(plain, [64, 32], tiles=0) > apart
    plan, _ = make_plan(recipe, "train", tokenizer=pairs.tokenizer)
    write_plan(plan, plan_path(recipe, "train"))
    stream = open_split(recipe, split="train", tokenizer=pairs.tokenizer, tile_share=(0, 1))
    for i, (segments, documents) in enumerate(segments_of_a_dry_run(recipe, tmp_path)):
        assert segments == stream[i].conversation_lengths
        assert len(segments) == 2 * documents
    faulty = FaultyPack(pack=1, loss=0.5, loss_tokens=2, samples=["p0", "p1"])
    fault = FaultReport(
        step=1,
        reason="loss nan",
        action="skip",
        loss=0.5,
        grad_norm=1.0,
        packs=[faulty],
        gradients={},
        are_clipped=False,
    )
    told = inspect_fault(recipe, write_dump(fault, tmp_path), png=None)
    assert "pack 1: loss 0.5 of 2 pairs, samples p0, p1" in told


def test_media_of_pairs_are_counted_once_in_statistics(pairs: World) -> None:
    (found,) = collect_statistics(pairs.recipe, pairs.tokenizer).datasets
    # Of SAMPLES, and of the ordinary one.
    assert found.images.tolist() == [1, 0, 1, 0, 0]
    assert found.videos.tolist() == [0, 0, 1, 0, 0]
    assert len(found.seconds) == 1


@pytest.mark.parametrize("policy", ["reject", "cut", "drop_media"])
def test_a_pair_longer_than_a_pack_is_refused_by_name_and_never_cut(
    pairs: World, policy: str
) -> None:
    documents = dict(zip(("p0", "p1", "p2", "p3"), documents_in(pairs), strict=False))
    limit = round_up(sorted(map(len, documents.values()))[1], 16)
    recipe = pairs.recipe.replaced({"data.overlong": policy, "data.seq_length": limit})
    plan, left_out = make_plan(recipe, "train", tokenizer=pairs.tokenizer)
    reasons = {entry.key: entry.reason for entry in left_out if entry.key in documents}
    assert list(reasons) == [key for key, document in documents.items() if len(document) > limit]
    for key, reason in reasons.items():
        assert reason == (
            f"{len(documents[key])} tokens do not fit data.seq_length {limit}, and both answers of a "
            "pair belong in one pack"
        )
    assert plan.columns["tokens"].max() <= limit
    with pytest.raises(DataError, match="do not fit"):
        make_plan(recipe, "train", tokenizer=pairs.tokenizer, strict=True)


def test_pairs_are_refused_by_name_without_a_preference_loss(pairs: World) -> None:
    recipe = pairs.recipe.replaced({"dpo.beta": 0.0})
    plan, left_out = make_plan(recipe, "train", tokenizer=pairs.tokenizer)
    assert plan.num_documents == 1
    assert {entry.reason for entry in left_out} == {
        "is a pair with a rejected answer, which needs dpo.beta"
    }
    preferring, _ = make_plan(pairs.recipe, "train", tokenizer=pairs.tokenizer)
    assert list(compare_stamps(plan.stamp, preferring.stamp)) == [
        "dpo.beta is absent in the plan and any now"
    ]


def test_a_damaged_pair_keeps_its_bounds_and_is_masked_whole(pairs: World) -> None:
    documents = documents_in(pairs)[:2]
    batch = collate(
        documents,
        pack_id=0,
        sources=[0, 0],
        data=pairs.recipe.data,
        pad_id=pairs.tokenizer.pad_id,
        tiles=torch.zeros(0, 3, 28, 28, dtype=torch.uint8),
        tile_ids=torch.zeros(0, dtype=torch.int64),
    )
    masked = mask_documents(batch, [0], pad_id=pairs.tokenizer.pad_id, rows_per_tile=4)
    stop = int(batch.document_starts[1])
    assert (masked.labels[:stop] == IGNORED_LABEL).all()
    assert torch.equal(masked.cu_seqlens, batch.cu_seqlens)
    assert np.array_equal(masked.labels[stop:], batch.labels[stop:])
