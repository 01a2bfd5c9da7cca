"""A port for a daemon that a test starts."""

import contextlib
import secrets
import socket


def unused_port() -> int:
    """Of those that kernels give to nobody who asks for any port: so no other test gets it before the daemon has it."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
