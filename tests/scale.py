"""Sizes of tests: a small one by default, the whole one with `pytest --full` (`make test-all`)."""

_full = False


def choose_full(full: bool) -> None:
    """Set which size `scaled` gives; called once, before tests are collected."""
    global _full
    _full = full


def scaled[T](small: T, *, full: T) -> T:
    """The size for this run."""
    if _full:
        return full
    return small
