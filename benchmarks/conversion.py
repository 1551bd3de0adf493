"""Seconds and peak memory of converting a synthetic model, against copying its files.

    python benchmarks/conversion.py [--folder DIR] [--layers 28] [--rounds 3]

Writes safetensors of Qwen2.5-7B's shapes (15.2 GB; fewer layers make less) with random bf16
weights. Then, in turns: copies the files, converts them to a distributed checkpoint, and converts
that back. Each begins with a cold page cache of what it reads and ends when all it wrote is on the
disk. Peak memory is the process's resident set, which counts pages of mapped files, too.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from model_shapes import QWEN2_7B

from megatron_vita.config import LanguageConfig, ModelConfig
from megatron_vita.convert.families.language_config import write_language
from megatron_vita.convert.families.language_tables import language_table
from megatron_vita.convert.families.mapping import location_of
from megatron_vita.convert.formats.safetensors_writer import SafetensorsWriter
from megatron_vita.convert.shapes import stored_shapes
from megatron_vita.convert.transfers import Transfer


def shape(layers: int) -> LanguageConfig:
    """Shape of Qwen2.5-7B with so many layers."""
    return LanguageConfig(**QWEN2_7B | {"num_layers": layers})


def write_model(folder: Path, layers: int) -> int:
    """Write the synthetic model; returns its size in bytes."""
    folder.mkdir(parents=True)
    language = shape(layers)
    shapes = stored_shapes(
        ModelConfig(text_only=True, language=language), parts=("language_model",)
    )
    transfers = []
    for rule in language_table(language):
        place = location_of(rule.ours)
        transfers.append(
            Transfer(rule=rule, place=place, whole=shapes[place.key], dtype=torch.bfloat16)
        )
    groups = [transfer.their_infos(folder) for transfer in transfers]
    writer = SafetensorsWriter(folder, groups, largest=5 << 30)
    for group in groups:
        for name, info in group.items():
            writer.write(name, torch.empty(info.shape, dtype=info.dtype).normal_(std=0.02))
    writer.close()
    (folder / "config.json").write_text(json.dumps(write_language(language, {})))
    return sum(info.nbytes for group in groups for info in group.values())


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy(source: Path, destination: Path) -> float:
    """Measure the seconds of copying a folder's files, each synced to disk."""
    forget(source)
    started = time.perf_counter()
    destination.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, destination / file.name)
        descriptor = os.open(destination / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def convert(command: str, source: Path, destination: Path) -> tuple[float, float]:
    """Measure seconds and peak GiB of a conversion, including the start of its process."""
    forget(source)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_vita.convert", command, str(source), str(destination)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} failed"
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/conversion"), help="where some 45 GB have room"
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source = options.folder / f"theirs-{options.layers}"
    folder = options.folder
    if not source.exists():
        sys.stdout.write(f"{write_model(source, options.layers) / 1e9:.1f} GB written\n")
    rows: dict[str, list[tuple[float, float]]] = {"copy": [], "from-hf": [], "to-hf": []}
    for _ in range(options.rounds):
        for name in ("copied", "ours", "again"):
            shutil.rmtree(folder / name, ignore_errors=True)
        rows["copy"].append((copy(source, folder / "copied"), 0.0))
        shutil.rmtree(folder / "copied")
        rows["from-hf"].append(convert("from-hf", source, folder / "ours"))
        rows["to-hf"].append(convert("to-hf", folder / "ours", folder / "again"))
    sys.stdout.write("| what | seconds (median) | of the copy | peak, GiB |\n|---|---|---|---|\n")
    base = statistics.median(seconds for seconds, _ in rows["copy"])
    for name, measured in rows.items():
        seconds = statistics.median(s for s, _ in measured)
        peak = max(peak for _, peak in measured)
        every = ", ".join(f"{s:.1f}" for s, _ in measured)
        sys.stdout.write(
            f"| {name} | {seconds:.1f} ({every}) | {seconds / base:.2f} | {peak:.2f} |\n"
        )


if __name__ == "__main__":
    main()
