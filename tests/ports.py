"""Ports for servers of tests."""

import random
import socket

# Below those that the system gives to outgoing connections, which may take a port at any moment.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Return a port of this host that nobody listens at."""
    # Not from the seed of a test: tests that run side by side would try the same ports.
    draw = random.SystemRandom()
    while True:
        port = draw.choice(_PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
