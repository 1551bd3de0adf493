"""A hang ends the job by itself, and a report says which rank, where and with which samples."""

import re
from pathlib import Path

import pytest

from megatron_vita.supervise.rank_failure import HUNG
from tests.functional.hang_job import processes_left, run_hanging
from tests.functional.hang_kinds import HANG_SECONDS, HANGS
from tests.functional.launch import ON_GPUS
from tests.scale import scaled

pytestmark = pytest.mark.skipif(ON_GPUS, reason="its ranks reduce tensors of the host by gloo")
KINDS = scaled(["loader"], full=list(HANGS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hang_is_reported_by_rank_phase_and_samples_and_ends_the_job(
    tmp_path: Path, kind: str
) -> None:
    ended = run_hanging(kind, tmp_path)
    assert ended.returncode == HUNG, ended.stderr
    (report,) = (tmp_path / "hangs").iterdir()
    text = report.read_text()
    assert HANG_SECONDS <= float(text.split()[3]) < 10 * HANG_SECONDS
    assert re.search(rf"rank 1 on \S+ {HANGS[kind].said}", text.splitlines()[0]), text
    assert f"all ranks and their stacks are in {report}" in ended.stderr
    # where both ranks are, with the stacks of their main threads
    assert re.search(
        r"rank 0 on \S+, process \d+: step 2, micro-batch 1, forward, in gloo:all_reduce \d+ \[3, 4\]",
        text,
    )
    assert text.count("hang_worker.py") >= (4 if HANGS[kind].has_stacks else 2)
    assert processes_left(text) == []
