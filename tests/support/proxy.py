"""A proxy in front of Postgres' socket that can lose an answer."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path


class Proxy:
    """Passes bytes on to a server; told to, it hangs up in place of the answer to the next statement that matches."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.directory = directory
        self._target = str(target)
        self._lose: bytes | None = None
        self._welcome: int | None = None
        #: How many answers have been lost.
        self.lost = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_answer_to(self, mark: bytes) -> None:
        """Lose the answer to the next flush that contains ``mark``; the server does execute it."""
        self._lose = mark

    def refuse(self, after: int | None) -> None:
        """Hang up on new connections once ``after`` answers have been lost; None lets them in again."""
        self._welcome = after

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._welcome is not None and self.lost >= self._welcome:
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        losing = threading.Event()
        threading.Thread(target=self._answer, args=(client, server, losing), daemon=True).start()
        with suppress(OSError):
            while data := client.recv(65536):
                if self._lose is not None and self._lose in data:
                    self._lose = None
                    losing.set()
                server.sendall(data)
        server.close()

    def _answer(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if losing.is_set():
                    self.lost += 1
                    break
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()
