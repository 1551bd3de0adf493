"""Media are read in processes that may be killed: whatever a file does to a decoder, only its own
request ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_vita import platform
from megatron_vita.data.samples.encoding import Medium, TileFormat
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.errors import DataError, PlatformError
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import OutputDelta, SamplingParams
from megatron_vita.inference.vision import decode_pool, tile_decoder
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.media.tiling import Grid, Tiling
from megatron_vita.media.video import probe_video
from megatron_vita.supervise.shared_memory import SharedFile
from tests.forked import run_program
from tests.inference.tiny import picture, tiny_engine, video

FORM = TileFormat(Tiling(tile_size=16, grids=(Grid(2, 1),)), "imagenet")
FRAMES = Medium("clip", 5, None, [0.0, 1.0, 2.0, 3.0, 4.0])
GREEDY = SamplingParams(max_new_tokens=4)
LONG = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture
def readers() -> DecodePool:
    return DecodePool(FORM, count=2, seconds=30)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose decoders do what the names of files say, within 3 seconds."""
    platform.initialize_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_pool, "PROGRAM", "tests.inference.hostile_reader")
        engine = tiny_engine(tmp_path_factory.mktemp("engine"), media_seconds=3.0)
        engine.generate([Prompt.ask("what is in this", videos=[video()])], sampling=GREEDY)
        yield engine


def program() -> psutil.Process:
    """The program that forks readers."""
    return psutil.Process(decode_pool.start().process.pid)


def count_of_new(before: set[int]) -> int:
    """Readers that are not among those of `before`."""
    return len({process.pid for process in program().children()} - before)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def hostile_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers obey the names of files."""
    monkeypatch.setattr(decode_pool, "PROGRAM", "tests.inference.hostile_reader")


@pytest.fixture
def before() -> set[int]:
    """Readers of others."""
    return {process.pid for process in program().children()}


def test_answers_are_those_of_this_process(readers: DecodePool) -> None:
    file = SharedFile(video().data)
    assert readers.probe(file, "clip") == probe_video(video().data, "clip")
    assert readers.probe(file, "clip").size[0] > 0
    part = readers.decode(file, FRAMES, name="clip", tiles=range(1, 4))
    assert np.array_equal(
        part, decode_tiles(FRAMES, video().data, name="clip", tiles=range(1, 4), tile_format=FORM)
    )
    image = picture(1).data
    grid = Medium("a", 3, Grid(2, 1), [])
    found = readers.decode(SharedFile(image), grid, name="a", tiles=range(3))
    assert np.array_equal(
        found, decode_tiles(grid, image, name="a", tiles=range(3), tile_format=FORM)
    )


def test_what_forks_has_one_thread(readers: DecodePool) -> None:
    readers.probe(SharedFile(video().data), "clip")
    assert program().num_threads() == 1


def test_many_threads_share_the_readers_of_one_file(readers: DecodePool, before: set[int]) -> None:
    """Each process has its own place in the file."""
    file = SharedFile(video().data)
    found = {}

    def look(number: int) -> None:
        found[number] = readers.decode(file, FRAMES, name="clip", tiles=range(number % 5, 5))

    threads = [threading.Thread(target=look, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = decode_tiles(FRAMES, video().data, name="clip", tiles=range(5), tile_format=FORM)
    assert len(found) == 20
    assert all(np.array_equal(part, whole[number % 5 :]) for number, part in found.items())
    assert count_of_new(before) <= 2


def test_errors_name_the_file_and_cost_no_process(readers: DecodePool, before: set[int]) -> None:
    for _ in range(5):
        with pytest.raises(DataError, match=r"^text\.mp4: cannot read this video of 4 bytes"):
            readers.probe(SharedFile(b"text"), "text.mp4")
    assert count_of_new(before) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hangs", "reading it takes more than 3 seconds"),
        ("crashes", "reading it ends the process that does it"),
        ("fails", "cannot be read: ZeroDivisionError: of a decoder"),
    ],
)
def test_a_decoder_that_misbehaves_ends_one_request(
    hostile: Engine, name: str, reason: str
) -> None:
    good = Prompt.ask("what is in this", videos=[video()])
    bad = Prompt.ask(
        "what is in this", videos=[MediaFile(name=name, data=video(5 + len(name)).data)]
    )
    (alone,) = hostile.generate([good], sampling=GREEDY)
    for _ in range(2):  # what it left in the cache must not be taken for known
        one, ended, other = hostile.generate([good, bad, good], sampling=GREEDY)
        assert (ended.finish, ended.error) == ("error", f"{name}: {reason}")
        assert (one.token_ids, other.token_ids) == (alone.token_ids, alone.token_ids)
    with pytest.raises(DataError, match=reason):
        hostile.prepare(
            Prompt.ask("what", videos=[MediaFile(name=f"early {name}", data=video().data)])
        )


def test_a_film_that_is_slow_to_decode_holds_nobody_up(hostile: Engine) -> None:
    slow = hostile.prepare(
        Prompt.ask("what is in this", videos=[MediaFile(name="slow", data=video(7).data)])
    )
    alone = hostile.generate([Prompt.ask("what color is the shape")], sampling=LONG)[0]
    film = hostile.add(slow, GREEDY)
    asked = [
        Prompt.ask("what color is the shape"),
        Prompt.ask("two images of cats", images=[picture(3)]),
    ]
    others = [hostile.add(hostile.prepare(prompt), LONG) for prompt in asked]
    pieces: list[OutputDelta] = []
    while hostile.has_work:
        pieces += hostile.step()
    assert [piece.request for piece in pieces if piece.finish][-1] == film
    first_of_film = [piece.request for piece in pieces].index(film)
    assert sum(piece.request in others for piece in pieces[:first_of_film]) >= 2 * 40
    said = [token for piece in pieces if piece.request == others[0] for token in piece.token_ids]
    assert said == alone.token_ids


@pytest.fixture
def long_films(hostile: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine has two decoders, and a film may be of so many runs."""
    monkeypatch.setattr(tile_decoder, "DECODERS", 2)
    monkeypatch.setattr(tile_decoder, "SHARE", 1)
    monkeypatch.setattr(tile_decoder, "_FEWEST", 1)
    monkeypatch.setattr(hostile.worker.features.decoder, "_pool", ThreadPoolExecutor(2))
    return hostile


def test_a_film_that_hangs_leaves_decoders_to_others(long_films: Engine) -> None:
    hangs = MediaFile(name="hangs", data=video(11).data)
    film = long_films.add(long_films.prepare(Prompt.ask("what is in this", videos=[hangs])), GREEDY)
    long_films.step()
    began = time.monotonic()
    image = long_films.add(
        long_films.prepare(Prompt.ask("two images of cats", images=[picture(77)])), GREEDY
    )
    ended: list[OutputDelta] = []
    while not any(piece.request == image for piece in ended):
        ended += [piece for piece in long_films.step() if piece.finish]
    assert time.monotonic() - began < 2.0
    long_films.cancel(film)
    while long_films.has_work:
        long_films.step()


def test_what_is_read_for_a_cancelled_request_ends_at_once(long_films: Engine) -> None:
    films = [MediaFile(name="hangs", data=video(14 + k).data) for k in range(2)]  # of all decoders
    numbers = [
        long_films.add(long_films.prepare(Prompt.ask("what is in this", videos=[film])), GREEDY)
        for film in films
    ]
    began = time.monotonic()
    long_films.step()
    wait_until(lambda: len(long_films._readers._busy) == 2)
    for number in numbers:
        long_films.cancel(number)
    (answer,) = long_films.generate(
        [Prompt.ask("two images of cats", images=[picture(78)])], sampling=GREEDY
    )
    assert time.monotonic() - began < 2.0
    assert not answer.error


def test_readers_of_a_stopped_file_are_killed_and_others_go_on(
    hostile_program: None, before: set[int]
) -> None:
    readers = DecodePool(FORM, count=3, seconds=30)
    file = SharedFile(video().data)
    with ThreadPoolExecutor() as pool:
        hang = [
            pool.submit(readers.decode, file, FRAMES, name="hangs", tiles=range(1))
            for _ in range(2)
        ]
        slow = pool.submit(
            readers.decode, SharedFile(video().data), FRAMES, name="slow", tiles=range(1)
        )
        wait_until(lambda: count_of_new(before) == 3)
        time.sleep(0.5)  # until they are in the midst of it
        readers.stop(file)
        wait_until(lambda: count_of_new(before) == 1)
        assert all(isinstance(each.exception(1.0), DataError) for each in hang)
        with pytest.raises(DataError, match="hangs: it is read no longer"):
            readers.decode(file, FRAMES, name="hangs", tiles=range(1))
        assert len(slow.result(10)) == 1


def test_a_beginning_shared_with_a_film_that_hangs_is_computed_at_once(hostile: Engine) -> None:
    system = {"role": "system", "content": "yes there is a red circle in this picture"}

    def ask(text: str, *films: MediaFile) -> int:
        prompt = Prompt.ask(text, videos=films)
        return hostile.add(
            hostile.prepare(Prompt(messages=[system, *prompt.messages], videos=list(films))), GREEDY
        )

    films = [
        ask("what is in this", MediaFile(name="hangs", data=video(12 + k).data)) for k in range(2)
    ]
    text = ask("no cats")
    began = time.monotonic()
    ended: list[OutputDelta] = []
    while not any(piece.request == text for piece in ended):
        ended += [piece for piece in hostile.step() if piece.finish]
    assert time.monotonic() - began < 2.0
    for film in films:
        hostile.cancel(film)
    while hostile.has_work:
        hostile.step()


def test_closing_waits_for_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool, "PROGRAM", "tests.inference.hostile_reader")
    engine = tiny_engine(tmp_path, media_seconds=30.0)
    engine.add(
        engine.prepare(
            Prompt.ask("what is in this", videos=[MediaFile(name="hangs", data=video(5).data)])
        ),
        GREEDY,
    )
    engine.step()
    threads = engine.worker.features.decoder._pool._threads
    began = time.monotonic()
    engine.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 5


def test_signals_to_the_whole_service_leave_readers_to_it(readers: DecodePool) -> None:
    file = SharedFile(video().data)
    readers.probe(file, "clip")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for process in (*program().children(), program()):
            process.send_signal(number)
        time.sleep(0.1)
        assert readers.probe(file, "clip").frames > 0


def test_there_are_descriptors_for_the_files_of_many_prompts() -> None:
    code = (
        "import resource\n"
        "from megatron_vita.inference.vision import decode_pool\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "decode_pool.start()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)\n"
    )
    run_program("-c", code).check_returncode()


def test_a_request_whose_film_is_being_decoded_can_be_cancelled(hostile: Engine) -> None:
    number = hostile.add(
        hostile.prepare(
            Prompt.ask("what is in this", videos=[MediaFile(name="hangs", data=video(9).data)])
        ),
        GREEDY,
    )
    assert hostile.step() == []
    hostile.cancel(number)
    assert [piece.finish for piece in hostile.step()] == ["cancelled"]
    hostile.forget(number)
    assert not hostile.has_work
    assert hostile.statistics().cache_tokens_used == 0


def test_a_killed_reader_is_replaced(readers: DecodePool, before: set[int]) -> None:
    file = SharedFile(video().data)
    readers.probe(file, "clip")
    (reader,) = (process for process in program().children() if process.pid not in before)
    reader.kill()
    reader.wait(10)
    with pytest.raises(DataError, match="clip: reading it ends the process"):
        readers.probe(file, "clip")
    assert readers.probe(file, "clip").frames > 0


def kill(process: psutil.Process) -> None:
    """Kill a process and wait until it has ended, which takes a while on a busy machine."""
    with suppress(psutil.NoSuchProcess):  # it ends by itself when its reader has
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:  # its parent still has to reap it
            time.sleep(0.01)


def test_a_program_that_has_ended_is_no_fault_of_the_file(readers: DecodePool) -> None:
    file = SharedFile(video().data)
    readers.probe(file, "clip")
    for process in (*program().children(), program()):
        kill(process)
    with pytest.raises(PlatformError, match="the program that reads media has ended with code -9"):
        readers.probe(file, "clip")
    assert readers.probe(file, "clip").frames > 0
    kill(program())
    with pytest.raises(PlatformError, match="the program that reads media has ended with code -9"):
        DecodePool(FORM, count=1, seconds=30).probe(file, "clip")


def test_readers_end_with_their_owner(readers: DecodePool, before: set[int]) -> None:
    fresh = DecodePool(FORM, count=2, seconds=30)
    fresh.probe(SharedFile(video().data), "clip")
    assert count_of_new(before) == 1
    del fresh
    deadline = time.monotonic() + 10
    while count_of_new(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count_of_new(before) == 0


def test_readers_end_with_the_process_that_asked_them_however_it_ends() -> None:
    code = (
        "import sys\n"
        "from tests.inference.test_decode_pool import *\n"
        "readers = DecodePool(FORM, count=2, seconds=30)\n"
        "readers.probe(SharedFile(video().data), 'clip')\n"
        "print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n"
        "sys.stdin.read()\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=-1, stdout=-1, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))
