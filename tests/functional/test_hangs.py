"""A hang ends the job by itself, and a report says which rank, where and with which samples."""

import re
from pathlib import Path

import psutil
import pytest

from megatron_vita.supervise.ranks import HUNG
from tests.functional.hang_worker import HANG_SECONDS
from tests.functional.launch import ON_GPUS, torchrun
from tests.scale import scaled

pytestmark = pytest.mark.skipif(ON_GPUS, reason="its ranks reduce tensors of the host by gloo")
SAID = {
    "loader": r"rank 1 on \S+ waits for its loader.*get \(.*queue.py.*step 2, micro-batch 2, loading",
    "stopped": r"rank 1 on \S+ is stopped \(SIGSTOP\); step 2, micro-batch 1, forward; samples key_1_1",
    "native": r"rank 1 on \S+ does not answer: native code holds its interpreter; step 2.*forward.*key_1_1",
    "lock": r"rank 1 on \S+ stays in forward \(at in_a_lock \(.*samples key_1_1",
    "skipped": r"rank 1 on \S+ is in recv while others wait for it in gloo:all_reduce \d+ \[3, 4\]",
    "storage": r"rank 1 on \S+ saves: the file system of the checkpoints does not answer \(at in_file_system",
}
KINDS = scaled(["loader"], full=list(SAID))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hang_is_reported_by_rank_phase_and_samples_and_ends_the_job(
    tmp_path: Path, kind: str
) -> None:
    ended = torchrun("hang_worker.py", kind, str(tmp_path), processes=2, check=False, seconds=200)
    assert ended.returncode == HUNG, ended.stderr
    (report,) = (tmp_path / "hangs").iterdir()
    text = report.read_text()
    assert HANG_SECONDS <= float(text.split()[3]) < 10 * HANG_SECONDS
    assert re.search(SAID[kind], text.splitlines()[0]), text
    assert f"all ranks and their stacks are in {report}" in ended.stderr
    # where both ranks are, with the stacks of their main threads
    assert re.search(
        r"rank 0 on \S+, process \d+: step 2, micro-batch 1, forward, in gloo:all_reduce \d+ \[3, 4\]",
        text,
    )
    assert text.count("hang_worker.py") >= (2 if kind == "stopped" else 4)
    named = [int(pid) for pid in re.findall(r", process (\d+):", text)]
    assert not any(psutil.pid_exists(pid) for pid in named)
