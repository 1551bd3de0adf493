"""Free memory of the host, and buffers allocated from it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita.errors import PlatformError
from megatron_vita.platform import pinned
from megatron_vita.platform.pinned import available_host_memory, host_buffers

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "kib"),
    [
        ({}, 600),
        ({V2 + "memory.max": "max\n", V2 + "memory.current": "1\n"}, 600),
        ({V2 + "memory.max": "512000\n", V2 + "memory.current": "102400\n"}, 400),
        (
            {
                V2 + "memory.max": "512000\n",
                V2 + "memory.current": "512000\n",
                V2 + "memory.stat": "anon 5\ninactive_file 102400\n",
            },
            100,
        ),
        ({V2 + "memory.max": "1024\n", V2 + "memory.current": "4096\n"}, 0),
        ({V2 + "memory.max": "819200\n", V2 + "memory.current": "0\n"}, 600),
        (
            {
                V1 + "memory.limit_in_bytes": "512000\n",
                V1 + "memory.usage_in_bytes": "204800\n",
                V1 + "memory.stat": "inactive_file 1\ntotal_inactive_file 102400\n",
            },
            400,
        ),
        (
            {
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "memory.usage_in_bytes": "1\n",
            },
            600,
        ),
    ],
)
def test_a_control_group_may_allow_less_than_the_host_has(
    tmp_path: Path, files: dict[str, str], kib: int
) -> None:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_host_memory(tmp_path) == kib * 1024


def test_this_host_has_some_memory() -> None:
    assert 0 < available_host_memory() < 1 << 50


def test_buffers_have_their_sizes_to_the_byte() -> None:
    assert [buffer.untyped_storage().nbytes() for buffer in host_buffers([3, 1000, 3])] == [
        3,
        1000,
        3,
    ]


def test_memory_that_cannot_be_had_is_refused_by_size_and_field() -> None:
    with pytest.raises(
        PlatformError, match=r"524288\.0 GiB.*training\.activation_offload_fraction"
    ):
        host_buffers([1 << 48, 1 << 48])


class _Runtime:
    """CUDA's runtime, which pins `most` buffers."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.pinned: list[Any] = []
        self.cudaHostRegister = self.register
        self.cudaHostUnregister = self.unregister

    def register(self, address: int, size: int, flags: int) -> int:
        """0, or CUDA's code for want of memory."""
        assert flags == 0
        if len(self.pinned) == self.most:
            return 2
        self.pinned.append((address, size))
        return 0

    def unregister(self, address: int) -> None:
        """Forgets a buffer."""
        self.pinned = [pinned for pinned in self.pinned if pinned[0] != address]


def pin(monkeypatch: pytest.MonkeyPatch, runtime: _Runtime, sizes: list[int]) -> list[torch.Tensor]:
    monkeypatch.setattr(pinned.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: runtime)
    return host_buffers(sizes)


def test_pinned_buffers_are_registered_whole_and_forgotten_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = _Runtime(most=9)
    buffers = pin(monkeypatch, runtime, [64, 128])
    assert runtime.pinned == [(buffer.data_ptr(), len(buffer)) for buffer in buffers]
    assert pinned.pinned_bytes() == 64 + 128
    del buffers
    assert runtime.pinned == []
    assert pinned.pinned_bytes() == 0


def test_memory_that_cannot_be_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _Runtime(most=1)
    with pytest.raises(PlatformError, match=r"pinned host memory .*cudaHostRegister gave error 2"):
        pin(monkeypatch, runtime, [64, 128])
    assert runtime.pinned == []


def _flags_of_mapping(address: int) -> str:
    """Return the kernel's flags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line
    return ""


def test_buffers_ask_for_huge_pages() -> None:
    buffer = host_buffers([8 << 20])[0]
    middle = buffer.data_ptr() + len(buffer) // 2
    assert " hg" in _flags_of_mapping(middle)
