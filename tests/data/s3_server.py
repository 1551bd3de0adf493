"""An S3 store on loopback that fails as stores do, at a set rate: errors, cut bodies, dropped
connections."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class FaultyStore:
    """Serves the store; `faults` is the share of object reads that go wrong, evenly spread, `reads`
    counts them."""

    def __init__(self) -> None:
        self._store = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.faults = 0.0
        self.reads = 0
        self.failed = 0
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        is_read = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(
            (".tar", ".parquet")
        )
        self.reads += is_read
        if not is_read or int(self.reads * self.faults) == int((self.reads - 1) * self.faults):
            return self._store(environ, start_response)
        self.failed += 1
        if self.failed % 2:
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        return self._cut(self._store(environ, start_response))

    def _cut(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """Half of a body, then the end of the connection."""
        whole = b"".join(body)
        yield whole[: len(whole) // 2]
        raise ConnectionError("the store drops the connection")
