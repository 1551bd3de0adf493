"""Compressed files of samples, which no tool reads: they are refused by name, never skipped."""

from pathlib import Path

from megatron_vita.errors import ConfigError

_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".7z")


def refuse_compressed(file: Path, suffixes: tuple[str, ...]) -> None:
    """ConfigError if a file's name is that of a compressed one with one of the suffixes, as
    `a.jsonl.gz` for `.jsonl`."""
    name = file.name.lower()
    if name.endswith(".tgz"):
        name = name.removesuffix(".tgz") + ".tar.gz"
    ending = next(filter(name.endswith, _ENDINGS), "")
    if ending and name.removesuffix(ending).endswith(suffixes):
        raise ConfigError(f"{file}: is compressed ({ending}), and not read so: unpack it first")
