"""An S3 store on loopback that fails as stores do, at a set rate: errors, cut bodies, dropped
connections."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server


class FaultyStore:
    """Serves the store; `faults` is the share of object reads that go wrong, evenly spread, `reads`
    counts them. While it `is_down`, it refuses every request."""

    def __init__(self) -> None:
        self._store = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.faults = 0.0
        self.is_down = False
        self.reads = 0
        self.failed = 0
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        if self.is_down:
            return _refuse(start_response)
        is_read = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(
            (".tar", ".parquet")
        )
        self.reads += is_read
        if not is_read or int(self.reads * self.faults) == int((self.reads - 1) * self.faults):
            return self._store(environ, start_response)
        self.failed += 1
        if self.failed % 2:
            return _refuse(start_response)
        return self._cut(self._store(environ, start_response))

    @contextmanager
    def as_s3(self) -> Iterator[None]:
        """Let this process and its children reach the store as S3."""
        settings = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
        # fsspec keeps its clients, with the address of an earlier server.
        S3FileSystem.clear_instance_cache()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            yield
        S3FileSystem.clear_instance_cache()

    def _cut(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """Half of a body, then the end of the connection."""
        whole = b"".join(body)
        yield whole[: len(whole) // 2]
        raise ConnectionError("the store drops the connection")


def _refuse(start_response: Callable) -> list[bytes]:
    start_response("503 Slow Down", [("Content-Length", "0")])
    return []
