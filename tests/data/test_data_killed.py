"""A job killed at random points, with all its processes, and started again loses and repeats no
pack."""

import os
import pickle
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.data.reading_job import digest
from tests.data.toy_data import World, train_stream
from tests.forked import start_program
from tests.scale import scaled

KILLS = scaled(3, full=50)
ENDLESS = 1_000_000
HERE = Path(__file__).parent


def start(world_file: Path, folder: Path, last: int) -> subprocess.Popen:
    command = [str(HERE / "reading_job.py"), str(world_file), str(folder), str(last)]
    return start_program(*command, start_new_session=True)


def position(folder: Path) -> tuple[int, int]:
    """Number of the next pack and bytes of the log, as they were saved last."""
    try:
        number, size = (folder / "position").read_text().split()
    except FileNotFoundError:
        return 0, 0
    return int(number), int(size)


def wait_for_progress(job: subprocess.Popen, folder: Path, before: int) -> None:
    """Wait until the job has read a pack: its log, cut to `before` bytes first, grows."""
    log = folder / "read.log"
    started = time.time_ns()
    while job.poll() is None:
        # A killed job may have left a longer log.
        if log.exists() and log.stat().st_mtime_ns > started and log.stat().st_size > before:
            break
        time.sleep(0.01)


def test_a_job_killed_at_random_points_loses_and_repeats_nothing(
    world: World, tmp_path: Path
) -> None:
    draw = random.Random(11)
    world_file = tmp_path / "world.pickle"
    folder = tmp_path / "job"
    world_file.write_bytes(pickle.dumps(world))
    folder.mkdir()
    for _ in range(KILLS):
        job = start(world_file, folder, ENDLESS)
        wait_for_progress(job, folder, position(folder)[1])
        time.sleep(draw.random() * 0.3)
        readers = psutil.Process(job.pid).children(recursive=True)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        psutil.wait_procs(readers, timeout=10)
        assert not [reader for reader in readers if reader.is_running()]
    last = position(folder)[0] + 100
    assert start(world_file, folder, last).wait() == 0
    stream = train_stream(world, (1, 2))
    digests = [digest(stream[pack]) for pack in range(len(stream))]
    expected = [f"{i} {i % len(stream)} {digests[i % len(stream)]}" for i in range(last)]
    assert (folder / "read.log").read_text().splitlines() == expected


HANGING_JOB = """
import pickle, sys
from pathlib import Path
from tests.data.hostile_streams import hostile
from tests.data.toy_data import train_stream
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.worker import PackTask

if __name__ == "__main__":
    stream = hostile(train_stream(pickle.loads(Path(sys.argv[1]).read_bytes())), "hang", pack=1)
    for pack in read_packs(stream, map(PackTask, range(2)), num_workers=1, sample_seconds=3600):
        print("read", flush=True)
"""


def test_a_reader_in_a_decoder_does_not_outlive_the_job(world: World, tmp_path: Path) -> None:
    (tmp_path / "world.pickle").write_bytes(pickle.dumps(world))
    (tmp_path / "job.py").write_text(HANGING_JOB)
    command = [str(tmp_path / "job.py"), str(tmp_path / "world.pickle")]
    with start_program(*command, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        job.stdout.readline()
        time.sleep(1)
        readers = psutil.Process(job.pid).children(recursive=True)
        job.kill()
    _, alive = psutil.wait_procs(readers, timeout=10)
    for reader in alive:
        reader.kill()
    assert not alive
