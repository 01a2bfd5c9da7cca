"""A port for a daemon that a test starts."""

import contextlib
import secrets
import socket


def unused_port() -> int:
    """A free port outside the range from which the kernel assigns ports, so that no other test gets it before the
    daemon.
    """
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
