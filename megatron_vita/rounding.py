"""Integer division and rounding upwards: for int, and element-wise for integer NumPy arrays."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # config uses this module, and its --help should not wait for NumPy
    import numpy as np


def ceil_div[Count: (int, np.ndarray)](count: Count, size: int) -> Count:
    """Number of groups of at most `size` that hold `count` items: `count / size`, rounded up."""
    # Negated floor division stays in integers: float division is wrong above 2**53.
    return -(-count // size)


def round_up[Count: (int, np.ndarray)](count: Count, multiple: int) -> Count:
    """Smallest multiple of `multiple` that is at least `count`."""
    return ceil_div(count, multiple) * multiple
