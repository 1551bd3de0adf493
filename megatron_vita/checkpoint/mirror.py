"""Copies of a run's checkpoints in an object store, through fsspec.

    <url>/step_00000500/   the files of the checkpoint; its manifest is uploaded last
    <url>/latest           name of the newest complete checkpoint; updated after its manifest

The first rank uploads, in a process of its own, while training continues.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec
from fsspec.callbacks import Callback

from megatron_vita.checkpoint.claim import Claim
from megatron_vita.checkpoint.manifest import MANIFEST, SCORES
from megatron_vita.checkpoint.retention import Retention, is_name
from megatron_vita.checkpoint.saver import LATEST, set_latest
from megatron_vita.checkpoint.writing import Progress, WriterProcess, Written
from megatron_vita.errors import ConfigError, SaveError
from megatron_vita.files import publish
from megatron_vita.stores import with_retries

LAST_ATTEMPTS = 3
"""Attempts to upload the last checkpoint of a run, each with retries of its own."""
logger = logging.getLogger(__name__)


class Mirror:
    """A folder of checkpoints in an object store.

    Raises:
        ConfigError: the address cannot be understood, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # Not the instance of another process, from which this one may have been forked.
            self._store, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror {url!r}: {error}") from error
        self._root = root.rstrip("/")

    def put(self, checkpoint: Path, *, note_progress: Callable[[], None] = lambda: None) -> None:
        """Upload a checkpoint.

        note_progress: called after each part of a file.

        Raises:
            OSError: the store fails, after retries.
        """
        self._remove_parts()
        progress = _ProgressCallback(note_progress)
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        # In this order a reader finds a manifest only where all files are.
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            name = f"{checkpoint.name}/{path.relative_to(checkpoint)}"
            self._put_file(path, name, progress=progress)
            # Some stores report no parts.
            note_progress()
        self._write(LATEST, checkpoint.name.encode())

    def prune(self, retention: Retention) -> None:
        """Delete the complete checkpoints up to the latest that no rule names.

        Raises:
            OSError: the store fails, after retries.
        """
        latest = self.latest_name()
        complete = [
            name for name in self._names() if name <= latest and self._exists(f"{name}/{MANIFEST}")
        ]
        for name in retention.unnamed(complete, self._scores_of):
            # The manifest first: what is left of it must not look complete.
            with_retries(functools.partial(self._store.rm, self._path(f"{name}/{MANIFEST}")), name)
            with_retries(functools.partial(self._store.rm, self._path(name), recursive=True), name)

    def latest_name(self) -> str:
        """Return the name of the newest complete checkpoint; empty if there is none.

        Raises:
            OSError: the store fails, after retries.
        """
        if not self._exists(LATEST):
            return ""
        data: bytes = self._read(LATEST)
        return data.decode().strip()

    def fetch(self, folder: Path) -> Path | None:
        """Download the newest complete checkpoint to `folder`, and make it the latest there.

        Returns:
            Its path; None if there is none.

        Raises:
            OSError: the store fails, after retries, or the folder cannot be written.
        """
        name = self.latest_name()
        if not name or not self._exists(f"{name}/{MANIFEST}"):
            return None
        partial = folder / f".{name}.incomplete"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for source in with_retries(lambda: self._store.find(self._path(name)), name):
            inner = source.rpartition(f"{name}/")[2]
            target = partial / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            with_retries(functools.partial(self._store.get_file, source, str(target)), source)
        publish(partial, folder / name)
        set_latest(folder / name)
        return folder / name

    def _names(self) -> list[str]:
        listed = with_retries(lambda: self._store.ls(self._root, detail=False), self.url)
        names = (path.rstrip("/").rpartition("/")[2] for path in listed)
        return [name for name in names if is_name(name)]

    def _scores_of(self, name: str) -> dict[str, float]:
        try:
            scores: dict[str, float] = json.loads(self._read(f"{name}/{SCORES}"))
        except (OSError, ValueError):
            return {}
        return scores

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _exists(self, name: str) -> bool:
        # Other processes and jobs write there.
        self._store.invalidate_cache()
        return bool(with_retries(lambda: self._store.exists(self._path(name)), name))

    def _read(self, name: str) -> Any:
        return with_retries(lambda: self._store.cat_file(self._path(name)), name)

    def _write(self, name: str, data: bytes) -> None:
        with_retries(lambda: self._store.pipe_file(self._path(name), data), name)

    def _remove_parts(self) -> None:
        """Remove the parts of files whose upload was killed: S3 keeps and bills them for ever.

        The stores of other clouds remove them after a week.
        """
        if not isinstance(self._store, _PartialUploads):
            return
        bucket, _, folder = self._root.partition("/")
        try:
            for upload in with_retries(
                lambda: self._store.list_multipart_uploads(bucket), self.url
            ):
                name = upload["Key"].removeprefix(f"{folder}/" if folder else "")
                if is_name(name.partition("/")[0]):
                    self._store.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        # Such as for lack of the right to list them: nothing that an upload needs.
        except Exception as error:
            logger.warning("%s: parts of uploads are not removed: %s", self.url, error)

    def _put_file(self, path: Path, name: str, *, progress: Callback) -> None:
        # Object stores have no folders, and do nothing here.
        parent = self._path(name).rpartition("/")[0]
        with_retries(lambda: self._store.makedirs(parent, exist_ok=True), name)
        target = self._path(name)
        with_retries(lambda: self._store.put_file(str(path), target, callback=progress), name)


class _ProgressCallback(Callback):
    """fsspec's report of each part of a file."""

    def __init__(self, note_progress: Callable[[], None]) -> None:
        super().__init__()
        self._note_progress = note_progress

    def relative_update(self, inc: int = 1) -> None:
        """Note the progress of a transfer."""
        super().relative_update(inc)
        self._note_progress()


@runtime_checkable
class _PartialUploads(Protocol):
    """fsspec store that lists and removes unfinished uploads, as s3fs does."""

    def list_multipart_uploads(self, bucket: str) -> list[dict[str, str]]:
        """Return key and id of each upload that has begun and not ended."""

    def abort_mpu(self, bucket: str, key: str, mpu: str) -> None:
        """Remove the parts of an upload."""


class Uploads:
    """Uploads of a run's checkpoints, one at a time; of several pending ones only the newest.

    Args:
        url: the object store.
        retention: the rules by which checkpoints are kept there.
        retry_steps: steps after which an upload that failed is tried again.
        claim: the job's claim to its folder; one that has lost it changes nothing in the store.
        on_progress: called while `finish` waits for an upload that makes progress.
    """

    def __init__(
        self,
        url: str,
        *,
        retention: Retention,
        retry_steps: int,
        claim: Claim | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        Mirror(url)  # refuse an address that cannot be used, before the first step
        self._url = url
        self._retention = retention
        self._retry_steps = retry_steps
        self._claim = claim
        self._on_progress = on_progress
        self._waiting: Path | None = None
        self._retry_at = 0
        self._problem = ""  # of the last attempt
        self._uploading: Path | None = None
        self._process: WriterProcess | None = None

    def add(self, checkpoint: Path) -> None:
        """Upload a checkpoint, after the upload under way."""
        self._waiting = checkpoint
        self._retry_at = 0

    def poll(self, step: int) -> None:
        """Note the end of an upload, and begin the next; never waits."""
        if self._process is not None and not self._process.is_writing:
            self._end(step)
        if self._process is None and self._waiting is not None and step >= self._retry_at:
            # This rank alone is here: an error must not end it.
            try:
                self._begin(self._waiting)
            except (OSError, MemoryError) as error:
                self._note_failure(str(error) or type(error).__name__, step)

    def finish(self, step: int) -> None:
        """Wait until the newest checkpoint is uploaded.

        Raises:
            SaveError: it cannot be uploaded; it is whole in its folder.
        """
        if self._process is not None:
            self._end(step)
        for _ in range(LAST_ATTEMPTS):
            if self._waiting is None:
                return
            self._begin(self._waiting)
            self._end(step)
        if self._waiting is not None:
            raise SaveError(
                f"checkpoint.mirror {self._url}: {self._waiting} cannot be uploaded: {self._problem}"
            )

    def abort(self) -> None:
        """Give up the upload under way."""
        if self._process is not None:
            self._process.kill()
        self._process = None

    def _begin(self, checkpoint: Path) -> None:
        self._uploading = checkpoint
        self._waiting = None
        progress = Progress()
        self._process = WriterProcess(
            lambda: _upload(self._url, checkpoint, self._retention, progress, claim=self._claim),
            progress=progress,
        )

    def _end(self, step: int) -> None:
        """Wait for the process, and log the result of the upload."""
        assert self._process is not None
        error = self._process.result(self._on_progress).error
        self._process = None
        if error:
            self._note_failure(error, step)
        else:
            logger.info("uploaded %s to %s", self._uploading, self._url)

    def _note_failure(self, error: str, step: int) -> None:
        self._problem = error
        self._waiting = self._waiting or self._uploading
        self._retry_at = step + self._retry_steps
        logger.warning(
            "%s is not uploaded to %s: %s; the next attempt is after step %d, or at the end of the run",
            self._uploading,
            self._url,
            error,
            self._retry_at,
        )


def _upload(
    url: str,
    checkpoint: Path,
    retention: Retention,
    progress: Progress,
    *,
    claim: Claim | None = None,
) -> Written:
    try:
        if claim is not None:
            claim.check()
        mirror = Mirror(url)
        mirror.put(checkpoint, note_progress=progress.note)
    # Whatever a store's library raises must not end the run.
    except Exception as error:
        return Written(error=str(error) or type(error).__name__)
    try:
        mirror.prune(retention)
    # Such as for lack of permission to delete: the new checkpoint is uploaded.
    except Exception as error:
        logger.warning("%s: old checkpoints cannot be deleted: %s", url, error)
    return Written()
