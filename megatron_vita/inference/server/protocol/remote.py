"""Media from remote servers, guarded against server-side request forgery.

Addresses are checked where the connection is made, and it goes to the address that was checked, so
that a name that resolves differently the second time (DNS rebinding) gains nothing. Each redirect
is a connection of its own.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore

from megatron_vita.inference.server.protocol.api_errors import APIError, too_large

MAX_REDIRECTS = 3
MAX_URL_CHARACTERS = 8192
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[Address]]]
_UNQUOTED = "/%:@!$&'()*+,;=?~"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")
_AZURE = ipaddress.IPv4Address("168.63.129.16")
"""A public address by its number, behind which every virtual machine of Azure finds its host."""


def is_public(address: Address) -> bool:
    """True if an address, or the IPv4 address embedded in it, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        # IPv6 forms of private IPv4 addresses would pass the checks below.
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    if address == _AZURE or address in _SITE_LOCAL:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def resolve(host: str, port: int) -> list[Address]:
    """Resolve a host name to all its addresses; OSError if there is none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Link-local addresses end in a zone, such as %eth0.
    return [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]


class _CheckedBackend(httpcore.AnyIOBackend):
    """Network backend that connects to allowed addresses only."""

    def __init__(self, resolve: Resolve, is_allowed: Callable[[Address], bool]) -> None:
        super().__init__()
        self._resolve = resolve
        self._is_allowed = is_allowed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a host; a single private address among its addresses rejects it."""
        addresses = await self._resolve(host, port)
        private = [str(address) for address in addresses if not self._is_allowed(address)]
        # The error names no addresses: they would tell about the server's network.
        if private or not addresses:
            raise APIError(f"the host {host!r:.200} has no public address", code="private_address")
        return await super().connect_tcp(
            str(addresses[0]), port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(
        self, path: str, *_: Any, **__: Any
    ) -> httpcore.AsyncNetworkStream:
        """Reject Unix sockets, which lead to no remote server."""
        raise APIError(f"the socket {path!r:.200} has no public address", code="private_address")


class RemoteFetcher:
    """Downloads media within limits. Tests without internet replace `resolve` and `is_allowed`."""

    def __init__(
        self,
        *,
        seconds: float,
        resolve: Resolve = resolve,
        is_allowed: Callable[[Address], bool] = is_public,
    ) -> None:
        self._seconds = seconds
        self._backend = _CheckedBackend(resolve, is_allowed)

    async def fetch(self, url: str, *, most: int) -> bytes:
        """Download the body of an http(s) URL.

        Raises:
            APIError: it cannot be downloaded, or has more than `most` bytes.
        """
        try:
            async with (
                asyncio.timeout(self._seconds),
                httpcore.AsyncConnectionPool(network_backend=self._backend) as pool,
            ):
                return await self._follow(pool, url, most)
        except TimeoutError as error:
            raise APIError(f"{url!r:.200} did not come within {self._seconds:g} seconds") from error
        except (
            OSError,
            ValueError,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
        ) as error:
            raise APIError(f"{url!r:.200} cannot be fetched: {type(error).__name__}") from error

    async def _follow(self, pool: httpcore.AsyncConnectionPool, url: str, most: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._get(pool, url, most)
            if isinstance(found, bytes):
                return found
            # Each redirect passes `_get` and the address check again.
            url = urljoin(url, found)
        raise APIError(
            f"{url!r:.200} comes after {MAX_REDIRECTS} redirects: that is where this server gives up"
        )

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str, most: int) -> bytes | str:
        """Request a URL once; returns the body, or the location that it redirects to."""
        if len(url) > MAX_URL_CHARACTERS:
            message = f"{url!r:.200} has {len(url):,} characters: at most {MAX_URL_CHARACTERS:,} are taken"
            raise APIError(message, code="invalid_url")
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            # `http://trusted@evil/` names another host than it seems to.
            or parts.username is not None
        ):
            raise APIError(
                f"{url!r:.200}: a http or https URL with a host and without a user name is needed"
            )
        # No compression: a small response could expand to any size.
        headers = [(b"host", parts.netloc.encode("idna")), (b"accept-encoding", b"identity")]
        async with pool.stream("GET", _encoded(parts), headers=headers) as response:
            fields = {name.lower(): value for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and b"location" in fields:
                return fields[b"location"].decode("ascii")
            if response.status != 200:
                raise APIError(f"{url!r:.200} has status {response.status}")
            return await _read(response, url, most)


def _encoded(parts: SplitResult) -> httpcore.URL:
    """Encode a URL in ASCII; ValueError for an invalid host or port."""
    target = quote(parts.path or "/", safe=_UNQUOTED) + (
        f"?{quote(parts.query, safe=_UNQUOTED)}" if parts.query else ""
    )
    host = (parts.hostname or "").encode("idna")
    return httpcore.URL(scheme=parts.scheme, host=host, port=parts.port, target=target)


async def _read(response: httpcore.Response, url: str, most: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        # Content-Length is not trusted.
        if len(body) > most:
            raise too_large(
                f"{url!r:.200} has more than {most:,} bytes", limit="media_bytes", most=most
            )
    return bytes(body)
