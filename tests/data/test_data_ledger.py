"""The ledger: every event once, on disk before its pack is used, whole after a kill."""

from pathlib import Path

import pytest

from megatron_vita.data.loading.ledger import (
    Damage,
    Ledger,
    add_up_damage,
    merge_damage,
    read_ledgers,
)
from megatron_vita.errors import DataError


def event(pack: int, document: int = 0, reason: str = "cut short") -> Damage:
    return Damage(pack, document, "a-000000.tar", f"s{pack}", reason)


def test_events_are_on_disk_at_once_and_each_only_once(tmp_path: Path) -> None:
    ledger = Ledger([event(1)], path=tmp_path / "damaged" / "replica_00000.jsonl")
    ledger.add([event(1, reason="again"), event(2), event(3)])
    ledger.add([event(2)])
    assert read_ledgers(tmp_path / "damaged") == [event(2), event(3)]
    assert ledger.of_pack(1) == [event(1)]
    assert ledger.of_pack(9) == []


def test_files_of_several_replicas_are_one_ledger(tmp_path: Path) -> None:
    for replica, events in enumerate(([event(5), event(1)], [event(3), event(5)])):
        Ledger(path=tmp_path / f"replica_{replica}.jsonl").add(events)
    assert merge_damage(read_ledgers(tmp_path)) == [event(1), event(3), event(5)]


def test_a_line_torn_by_a_kill_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "replica_00000.jsonl"
    Ledger(path=path).add([event(1), event(2)])
    path.write_bytes(path.read_bytes()[:-7])
    assert read_ledgers(tmp_path) == [event(1)]
    Ledger(path=path).add([event(2, reason="struck again")])
    assert read_ledgers(tmp_path) == [event(1), event(2, reason="struck again")]


def test_a_spoilt_ledger_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "replica_00000.jsonl").write_text('{"pack": 1}\n')
    with pytest.raises(
        DataError, match=r"replica_00000.jsonl: not a ledger .*fix this line: b'\{\"pack\": 1\}"
    ):
        read_ledgers(tmp_path)


def test_what_all_ranks_of_a_replica_met_of_a_document_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "replica_00000.jsonl"
    met = [event(1), event(2), event(1, reason="as another rank says it"), event(1)]
    assert Ledger(path=path).add(met) == [event(1), event(2)]
    assert len(path.read_text().splitlines()) == 2


def repeats(pack: int, frames: int) -> Damage:
    return event(pack, reason="damaged frames")._replace(frames=frames)


def test_frames_that_stand_for_others_are_added_up_over_the_ranks_of_a_replica() -> None:
    met = [repeats(1, 2), repeats(2, 1), repeats(1, 3), event(2), repeats(2, 1)]
    assert add_up_damage(met) == [repeats(1, 5), event(2)]


def test_a_document_with_damaged_frames_that_cannot_be_read_later_is_masked(tmp_path: Path) -> None:
    ledger = Ledger([repeats(1, 2)], path=tmp_path / "replica_00000.jsonl")
    assert not ledger.of_pack(1)[0].is_masked
    assert ledger.add([repeats(1, 2)]) == []
    assert ledger.add([event(1)]) == [event(1)]
    assert ledger.add([repeats(1, 2), event(1)]) == []
    assert ledger.of_pack(1) == [event(1)]
    assert merge_damage([repeats(1, 2), *read_ledgers(tmp_path)]) == [event(1)]


def test_a_ledger_of_before_frames_were_counted_is_read(tmp_path: Path) -> None:
    line = '{"pack": 1, "document": 0, "shard": "a-000000.tar", "key": "s1", "reason": "cut short"}'
    (tmp_path / "replica_00000.jsonl").write_text(line + "\n")
    assert read_ledgers(tmp_path) == [event(1)]
