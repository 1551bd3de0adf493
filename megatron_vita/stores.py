"""Object stores through fsspec: actions that are tried again after a transient failure."""

import logging
import time
from collections.abc import Callable

ATTEMPTS = 5
FIRST_PAUSE = 0.2  # seconds before the second attempt, doubled before each further one
logger = logging.getLogger(__name__)


def with_retries[T](action: Callable[[], T], name: str) -> T:
    """Retry an action after transient failures of a store.

    Raises:
        OSError: the last attempt has failed.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError, ImportError, ValueError):
            # These do not pass: a wrong name, missing rights, a missing or misused library.
            raise
        except Exception as error:
            # Libraries of stores raise transient failures as exceptions of many types.
            if attempt == ATTEMPTS - 1:
                raise OSError(
                    0, f"{type(error).__name__}: {error} ({ATTEMPTS} attempts)"
                ) from error
            logger.info("%s: %s: %s; trying again", name, type(error).__name__, error)
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")
