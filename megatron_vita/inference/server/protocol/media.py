"""Images and videos of a request: data URLs, files under allowed folders, and remote URLs if
allowed."""

import asyncio
import base64
import binascii
import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megatron_vita.errors import DataError
from megatron_vita.inference.requests.prompt import MediaFile
from megatron_vita.inference.server.protocol.api_errors import APIError, too_large
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.protocol import ChatRequest, ImagePart, VideoPart
from megatron_vita.inference.server.protocol.remote import RemoteFetcher
from megatron_vita.media.images import FORMATS, image_size

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)

_FORMATS = [kind for kind in FORMATS if kind not in ("ICO", "PPM")]
"""Image formats of requests: not PPM, whose headers may be as long as files, nor ICO, which Pillow decodes to open."""


class MediaLoader:
    """Loads media within the limits; slow work runs in `pool`."""

    def __init__(
        self,
        *,
        limits: Limits,
        pool: Executor,
        roots: Sequence[Path] = (),
        remote: RemoteFetcher | None = None,
    ) -> None:
        self._limits = limits
        self._pool = pool
        # Resolved once: files are compared with the real folders behind links.
        self._roots = [root.resolve(strict=True) for root in roots]
        self._remote = remote

    async def load(self, request: ChatRequest) -> tuple[list[MediaFile], list[MediaFile]]:
        """Load a request's images and videos, named by their fields in the body.

        Raises:
            APIError: names the field that is wrong.
        """
        files: dict[type, list[MediaFile]] = {ImagePart: [], VideoPart: []}
        left = self._limits.media_bytes
        for field, part in request.parts():
            try:
                file = MediaFile(name=field, data=await self._read(_url(part), left))
                if isinstance(part, ImagePart):
                    await self._run(self._check_pixels, file)
            except APIError as error:
                raise about(field, error) from error
            # The limit holds for all media of a request together.
            left -= len(file.data)
            files[type(part)].append(file)
        return files[ImagePart], files[VideoPart]

    async def _read(self, url: str, most: int) -> bytes:
        scheme = url[:9].split(":", 1)[0].lower() if ":" in url[:9] else ""
        if scheme == "data":
            return await self._run(_data_url, url, most)
        if scheme in ("http", "https"):
            if self._remote is None:
                raise APIError(
                    "remote URLs are off on this server (its option --allow-remote-media): send a data URL",
                    code="remote_media_off",
                )
            return await self._remote.fetch(url, most=most)
        return await self._run(self._file, url, most)

    async def _run[*Args, T](self, function: Callable[[*Args], T], *arguments: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _file(self, url: str, most: int) -> bytes:
        """Read a file under one of the roots. Files elsewhere and missing files get the same error,
        so that clients cannot probe the file system."""
        refusal = APIError(
            f"{url!r:.200} is neither a data URL nor a file under the media folders of this server",
            code="media_not_found",
        )
        try:
            path = Path(_file_path(url))
            for root in self._roots:
                # Symbolic links are followed first, so that none leads out of the root.
                resolved = (root / path).resolve(strict=True) if (root / path).exists() else None
                if resolved is not None and resolved.is_relative_to(root):
                    return _read_file(resolved, most)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise refusal from error
        raise refusal

    def _check_pixels(self, image: MediaFile) -> None:
        """Reject images that are too large by their header, and formats without a bounded header."""
        try:
            size = image_size(image.data, image.name, formats=_FORMATS)
        except DataError as error:
            raise APIError(str(error), code="invalid_media") from error
        check_pixels(size, self._limits)


def check_pixels(size: tuple[int, int], limits: Limits) -> None:
    """Raise APIError if an image or frame of (width, height) has too many pixels."""
    width, height = size
    if width * height > limits.image_pixels:
        raise too_large(
            f"{width} x {height} pixels", limit="image_pixels", most=limits.image_pixels, status=400
        )


def _url(part: ImagePart | VideoPart) -> str:
    if isinstance(part, ImagePart):
        return part.image_url.url
    return part.video_url.url


def about(field: str, error: APIError) -> APIError:
    """Return the error with the name of the field that it concerns."""
    message = str(error) if str(error).startswith(field) else f"{field}: {error}"
    return APIError(
        message, status=error.status, param=field, code=error.code, headers=error.headers
    )


def _data_url(url: str, most: int) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise APIError("a data URL must begin with data:TYPE;base64,", code="invalid_media")
    # Slicing a view avoids a copy of a large payload.
    payload = memoryview(url.encode("ascii", errors="replace"))[head.end() :]
    # Checked before decoding, which would take the memory.
    size = len(payload) * 3 // 4
    if size > most:
        raise too_large(f"{size:,} bytes of media", limit="media_bytes", most=most)
    try:
        data = base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise APIError(
            f"the base64 of this data URL is invalid: {error}", code="invalid_media"
        ) from error
    if not data:
        raise APIError("this data URL is empty", code="invalid_media")
    return data


def _file_path(url: str) -> str:
    """Path in a `file:` URL, or a plain path; ValueError for other schemes and hosts."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{parts.netloc} is another machine")
        return unquote(parts.path)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url):
        raise ValueError(f"{parts.scheme} is no scheme of files")
    return url


def _read_file(path: Path, most: int) -> bytes:
    # A link that came since the path was resolved is not followed, and a pipe not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        # One byte more than allowed tells that the file is too large.
        data = file.read(most + 1)
    if len(data) > most:
        raise too_large(f"more than {most:,} bytes of media", limit="media_bytes", most=most)
    return data
