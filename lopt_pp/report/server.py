"""Serves the page on a run that goes on, to browsers on this machine alone.

`/` is the page, `/events` its changes as server-sent events. Nothing else is served: no request names a file.
"""

import http.server
import os
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from lopt_pp.errors import LoptError
from lopt_pp.report.live import Live

_HOST = "127.0.0.1"

_OWN_NAMES = {"127.0.0.1", "localhost"}
"""What a browser calls this machine, also through an SSH tunnel. A page from elsewhere whose own name points here
(DNS rebinding) is known by that name, and refused."""

_SILENCE = 15.0
"""Seconds after which a word is sent to a page that there is nothing new for, to see whether it is still there."""

_PATIENCE = 30.0
"""Seconds that a browser may take to ask, or to take what it is sent."""

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page of a run on the loopback interface.

    Args:
        directory: the output directory of the run; may be missing.
        port: 0 for any that is free.

    Raises:
        LoptError: the port cannot be had, or a file is where the directory should be.
    """

    daemon_threads = True

    def __init__(self, directory: Path, port: int) -> None:
        if os.path.exists(directory) and not os.path.isdir(directory):
            raise LoptError(f"{directory} is not a directory; give the --output_dir of a run")
        self.live = Live(directory)
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise LoptError(
                f"--port {port} cannot be used on {_HOST}: {error.strerror}; give another, or 0 for any that is free"
            ) from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{_HOST}:{self.port}/"

    def serve(self, on_ready: Callable[[], object] = lambda: None) -> None:
        """Serves until `shutdown` is called in another thread, or this one is interrupted."""
        threading.Thread(target=self.live.follow, daemon=True).start()
        try:
            on_ready()
            self.serve_forever(poll_interval=0.2)
        finally:
            self.live.close()
            self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle is not an error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: PageServer
    timeout = _PATIENCE
    server_version = "lopt-pp"
    sys_version = ""

    def do_GET(self) -> None:
        try:
            is_own = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname in _OWN_NAMES
        except ValueError:
            is_own = False
        if not is_own:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this page is for browsers on this machine\n")
            return
        asked = urllib.parse.urlsplit(self.path)
        if asked.path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.server.live.page())
        elif asked.path == "/events":
            given = urllib.parse.parse_qs(asked.query).get("since", [""])[0]
            self._send_events(self.headers.get("Last-Event-ID") or given)
        elif asked.path == "/favicon.ico":  # Every browser asks for it.
            self._answer(HTTPStatus.NO_CONTENT, "image/x-icon", "")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "the page is /\n")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self._send_head(status, kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_head(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")

    def _send_events(self, known: str) -> None:
        self._send_head(HTTPStatus.OK, "text/event-stream")
        self.end_headers()
        with self.server.live.watched():
            self._send("retry: 2000\n\n")
            while True:
                try:
                    update = self.server.live.update(known, _SILENCE)
                except EOFError:
                    return
                if update is None:
                    self._send(": still here\n\n")
                else:
                    known, changes = update
                    self._send(f"id: {known}\ndata: {changes}\n\n")

    def _send(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of each request."""


def how_to_reach(server: PageServer) -> str:
    """Where the page is, in lines for the terminal."""
    port = server.port
    return (
        f"the page is at {server.address} (Ctrl-C ends it)\n"
        f"from another machine: ssh -L {port}:{_HOST}:{port} {socket.gethostname()}, and open the same address there"
    )
