"""The ledger: every event once, on disk before its pack is used, whole after a kill."""

from pathlib import Path

import pytest

from megatron_vita.data.loading.ledger import Damage, Ledger, merge_damage, read_ledgers
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
        DataError, match=r"replica_00000.jsonl: not a ledger .*mend this line: b'\{\"pack\": 1\}"
    ):
        read_ledgers(tmp_path)
