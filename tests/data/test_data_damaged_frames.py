"""Videos of which frames are damaged: used with others in their place, counted, shown, bounded."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vita.config import DataConfig
from megatron_vita.data.loading.ledger import Damage, Ledger, read_ledgers
from megatron_vita.data.loading.stream import PackStream, ReadPack
from megatron_vita.errors import VitaError
from megatron_vita.training.callbacks.damage import DamageCallback
from megatron_vita.training.step.batches import Agreement
from tests.data.toy_data import World, clip, train_stream
from tests.media.video_files import damage

LOST = range(3, 13)
"""Packets of the toy clip of which four frames that the toy recipe samples are."""


@pytest.fixture
def streams(own_world: World) -> list[PackStream]:
    """The packs of a world with one damaged clip, as one reader and as each of two read them."""
    shard = own_world.root / "more-000000.tar"
    whole = clip()
    shard.write_bytes(shard.read_bytes().replace(whole, damage(whole, LOST), 1))
    return [train_stream(own_world, share) for share in ((0, 1), (0, 2), (1, 2))]


def read_damaged(stream: PackStream) -> ReadPack:
    (found,) = [pack for pack in map(stream.read, range(len(stream))) if pack.damages]
    return found


def test_a_sample_with_damaged_frames_is_used_and_reported(streams: list[PackStream]) -> None:
    pack = read_damaged(streams[0])
    (event,) = pack.damages
    assert (event.shard, event.frames, event.is_masked) == ("more-000000.tar", 4, False)
    assert "video0.mp4: 10 packets cannot be decoded, 4 of 6 frames" in event.reason
    assert streams[0].fits(event)
    assert streams[0][pack.batch.pack_id].masked == []


class TwoReaders(Agreement):
    """An agreement that hears of another rank's events as well."""

    others: tuple[Damage, ...] = ()

    def _gather(self, pack: ReadPack) -> list[Damage]:
        return [*pack.damages, *self.others]


def test_ranks_that_read_parts_of_a_video_note_one_event(
    streams: list[PackStream], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = read_damaged(streams[0]).damages[0]
    parts = [read_damaged(stream) for stream in streams[1:]]
    agreement = TwoReaders(streams[1], Ledger(path=tmp_path / "replica_00000.jsonl"), group=None)
    agreement.others = tuple(parts[1].damages)
    with caplog.at_level(logging.WARNING):
        batch = agreement.finish(parts[0])
        agreement.finish(parts[0])
    (noted,) = read_ledgers(tmp_path)
    assert noted[:4] == alone[:4]
    assert noted.frames == alone.frames == 4
    assert batch.stand_ins == {alone.document: 4}
    assert batch.masked == []
    assert caplog.text.count("4 frames repeat others") == 1


def test_samples_with_damaged_frames_are_bounded_by_max_damaged(tmp_path: Path) -> None:
    event = Damage(0, 0, "a-000000.tar", "s1", "damaged frames", frames=3)
    run: Any = SimpleNamespace(
        train_stream=SimpleNamespace(plan=SimpleNamespace(documents_before=lambda _: 0)),
        consumed_packs=0,
        recipe=SimpleNamespace(data=DataConfig(max_damaged=0.001)),
        read_damage=lambda: [event],
        ledger_folder=tmp_path,
        step=1,
    )
    callback = DamageCallback(run)
    metrics: Any = SimpleNamespace(documents=10, damaged=1)
    callback.after_step(run, metrics)
    with pytest.raises(VitaError, match=r"2 of 20 samples are damaged.*s1 \(damaged frames\)"):
        callback.after_step(run, metrics)
