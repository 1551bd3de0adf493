"""Output folders that appear complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vita.errors import CheckpointError
from megatron_vita.files import publish, sync


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `destination` on success and removed on failure.

    A killed process leaves a hidden folder, which the next attempt removes.

    Raises:
        CheckpointError: `destination` exists and is not an empty folder, or cannot be written.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists and is not an empty folder; name a new one")
    temporary = destination.parent / f".{destination.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be made: {error.strerror}") from error
    try:
        yield temporary
        # Contents must be on disk before the rename is, or a crash could leave a complete-looking
        # folder of empty files.
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        publish(temporary, destination)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error
    # Ctrl-C too must leave no half folder.
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
