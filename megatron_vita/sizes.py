"""Sizes and counts in words."""

UNITS = ("kB", "MB", "GB", "TB")


def readable_bytes(size: float) -> str:
    """A number of bytes for reading, in decimal units: 512 bytes, 1.3 MB, 28 GB."""
    if size < 1000:
        return f"{int(size)} {'byte' if size == 1 else 'bytes'}"
    for unit in UNITS:
        size /= 1000
        if size < 999.5 or unit == UNITS[-1]:
            break
    return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: 1 sample, 2,000 samples."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {plural or f'{noun}s'}"
