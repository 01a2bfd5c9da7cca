"""A relay in front of a server, which can delay, hold up, lose and refuse what passes."""

import contextlib
import socket
import threading
import time


class Wire:
    """A TCP relay in front of the server; its mode is "through", "slow" (1.2 s per answer), "hangs", "loses answers" or
    "cut".

    Args:
        port: of the server; `upstream` may later be another one's.
    """

    def __init__(self, port):
        self.mode, self.upstream = "through", port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "cut":
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.upstream))
            except OSError:
                client.close()
                continue
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._relay, args=(source, sink, answers), daemon=True).start()

    def _relay(self, source, sink, answers):
        with source, sink:
            with contextlib.suppress(OSError):  # the other direction may have closed both sockets
                while data := source.recv(1 << 16):
                    if self.mode == "cut" or (answers and self.mode == "loses answers"):
                        break
                    while self.mode == "hangs":
                        time.sleep(0.05)
                    if answers and self.mode == "slow":
                        time.sleep(1.2)
                    sink.sendall(data)
            for end in (source, sink):  # both, so that the other direction does not wait any longer
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()
