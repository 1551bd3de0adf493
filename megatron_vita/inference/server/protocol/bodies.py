"""Limit of request bodies that are read at a time. They are no open requests yet, and one client
must not be able to occupy all places."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from megatron_vita.inference.server.protocol.api_errors import APIError


class BodyPlaces:
    """Places for request bodies. When all are taken, the client that holds most of them loses its
    oldest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._clients: dict[asyncio.Timeout, Hashable] = {}  # in the order in which they came

    def __len__(self) -> int:
        return len(self._clients)

    @asynccontextmanager
    async def place(self, client: Hashable) -> AsyncIterator[None]:
        """Hold a place while a body is read.

        Raises:
            APIError: the place was taken away.
        """
        if len(self._clients) >= self._most:
            self._take_one_away()
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._clients[timeout] = client
                yield
        except TimeoutError as error:
            # Some other timeout, such as the one of the whole request.
            if not timeout.expired():
                raise
            raise self._refusal() from error
        finally:
            self._clients.pop(timeout, None)

    def _take_one_away(self) -> None:
        [(busiest, _)] = Counter(self._clients.values()).most_common(1)
        oldest = next(timeout for timeout, client in self._clients.items() if client == busiest)
        del self._clients[oldest]
        # The timeout raises inside the task that reads the body.
        oldest.reschedule(0)

    def _refusal(self) -> APIError:
        message = (
            f"{self._most} bodies are being read, which is the limit (the server's option "
            "--open-bodies), and most of them for this client, whose oldest is given up"
        )
        headers = {"connection": "close"}
        return APIError(message, status=408, code="open_bodies_exceeded", headers=headers)
