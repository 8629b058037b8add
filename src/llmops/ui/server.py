"""The server of `llmops ui`: GET and HEAD, this machine alone, nothing is written.

A page in another tab can make a browser ask any address, also by a name that was pointed at 127.0.0.1 (DNS rebinding).
So a request must name the host that was listened on, or localhost; anything else is refused. The pages carry a policy
that lets them load nothing and send forms to this server only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from llmops.errors import LlmopsError
from llmops.store import Store
from llmops.ui.pages import comparison, listing, missing, run_page

__all__ = ["answer", "serve", "server"]

LOCAL = ("127.0.0.1", "localhost", "::1")
HEADERS = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


def answer(store: Store, target: str) -> tuple[HTTPStatus, str]:
    """(status, page) of a path with its query, as `/run/demo` or `/compare?v=demo/w4&v=other/w4`."""
    parts = urlsplit(target)
    head, _, name = parts.path.lstrip("/").partition("/")
    pages: dict[str, Callable[[], str]] = {
        "": lambda: listing(store), "run": lambda: run_page(store, unquote(name)),
        "compare": lambda: comparison(store, parse_qs(parts.query).get("v", []))}
    if head not in pages or (head != "run" and name):
        return HTTPStatus.NOT_FOUND, missing(f"There is no page {parts.path}.")
    try:
        return HTTPStatus.OK, pages[head]()
    except LlmopsError as error:
        return HTTPStatus.NOT_FOUND, missing(str(error))


class _Handler(BaseHTTPRequestHandler):
    """One request. hosts: names that a request may come under; None for any."""

    server_version, sys_version = "llmops", ""

    def __init__(self, *args: Any, store: Store, hosts: tuple[str, ...] | None, quiet: bool) -> None:
        self.store, self.hosts, self.quiet = store, hosts, quiet
        super().__init__(*args)

    def do_GET(self) -> None:
        self._send(body=True)

    def do_HEAD(self) -> None:
        self._send(body=False)

    def _send(self, body: bool) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if self.hosts is not None and host not in self.hosts:
            status, text = HTTPStatus.FORBIDDEN, missing(f'This server answers as {self.hosts[0]}, not as "{host}".')
        else:
            status, text = answer(self.store, self.path)
        data = text.encode("utf-8", errors="replace")
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        if not self.quiet:
            super().log_message(format, *args)


def server(runs: str | None, host: str, port: int, *, anywhere: bool = False,
           quiet: bool = True) -> ThreadingHTTPServer:
    """A server that listens and does not answer yet. Raises LlmopsError for a port that is taken, a host that cannot be
    listened on, and one that others can reach without `anywhere`."""
    if host not in LOCAL and not anywhere:
        raise LlmopsError(f"--host {host} can be reached by others, who could then read every run; expected 127.0.0.1, "
                          "or --anywhere beside it if that is meant")
    hosts = None if anywhere else (host, *LOCAL)
    try:
        return ThreadingHTTPServer((host, port), partial(_Handler, store=Store(runs), hosts=hosts, quiet=quiet))
    except (OSError, OverflowError) as error:
        raise LlmopsError(f"{host}:{port} cannot be listened on ({error}); give another --port, or --port 0 for a free "
                          "one") from error


def serve(runs: str | None, host: str, port: int, *, anywhere: bool = False, quiet: bool = False,
          stop: threading.Event | None = None) -> None:
    """Answer until Ctrl-C, or until `stop` is set. Raises LlmopsError as `server` does."""
    with server(runs, host, port, anywhere=anywhere, quiet=quiet) as serving:
        print(f"http://{host}:{serving.server_address[1]}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if stop is not None:
            threading.Thread(target=_until, args=(stop, serving), daemon=True).start()
        try:
            serving.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return


def _until(stop: threading.Event, serving: ThreadingHTTPServer) -> None:
    stop.wait()
    serving.shutdown()
