"""The local page's server: loopback only, a secret in every path, no caching, nothing from anywhere else.

A page of another site can neither read nor write here: it does not know the secret, requests whose Host is not this very address are refused (DNS
rebinding), and so are posts from another Origin or of another type than JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lmforge.errors import LmforgeError, RunError
from lmforge.formats.samples import Sampled
from lmforge.ranking import blind, pairs
from lmforge.ranking.ratings import Rating, Ratings, complaint, name_complaint

ADDRESS = "127.0.0.1"
LARGEST_BODY = 64 * 1024
QUIET_S = 30  # a connection that says nothing for so long is closed
UNDO_DEPTH = 200
PAGE = Path(__file__).with_name("page.html")


class Refused(Exception):
    """A request that gets an error: its status and what the page may show."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Page:
    """What the page asks and says, as plain data; HTTP is `Handler`'s."""

    def __init__(self, samples: Sequence[Sampled], ratings: Ratings, rater: str | None) -> None:
        self.samples = [one for one in samples if len(one.answers) > 1]
        self.left_out = len(samples) - len(self.samples)
        self.ratings, self.rater = ratings, rater
        self._by_id = {one.id: one for one in self.samples}

    def start(self) -> dict[str, Any]:
        """What the page needs before it knows who is there."""
        self.ratings.refresh()
        return {"rater": self.rater, "raters": [name for name in self.ratings.raters if ":" not in name], "prompts": len(self.samples)}

    def tasks(self, rater: str) -> dict[str, Any]:
        """Every prompt in this rater's blind order, with what was said already and what undo goes back to."""
        self._known(rater)
        self.ratings.refresh()
        mine = self.ratings.of(rater)
        history = [blind.state(self._by_id[one.id], rater, one) for one in self.ratings.before(rater)[-UNDO_DEPTH:] if one.id in self._by_id]
        tasks = [blind.task(one, rater, mine.get(one.id)) for one in self.samples]
        return {"rater": rater, "tasks": tasks, "history": history, "left_out": self.left_out, "agreement": self.agreement(rater)}

    def rate(self, said: Any) -> dict[str, Any]:
        """Save one click; Refused where it makes no sense."""
        if not isinstance(said, dict) or not isinstance(said.get("rater"), str) or not isinstance(said.get("id"), str) or said["id"] not in self._by_id:
            raise Refused(HTTPStatus.BAD_REQUEST, "no such prompt or rater")
        rater, sample = said["rater"], self._by_id[said["id"]]
        self._known(rater)
        positions: Any = said.get("places")
        seen = blind.order(sample, rater)
        if not _lists_of(positions, len(seen)):
            raise Refused(HTTPStatus.BAD_REQUEST, "places are not lists of answers")
        places = blind.unshown(positions, seen)
        rating = Rating(sample.id, rater, places, said.get("state"), undo=said.get("undo") is True)  # type: ignore[arg-type]  # complaint looks at it
        whole = sum(map(len, places)) == len(sample.answers)
        why = complaint(rating, len(sample.answers)) or ("" if (rating.state == "ranked") == whole else "a ranking is finished when every answer has its place")
        if why:
            raise Refused(HTTPStatus.BAD_REQUEST, why)
        self.ratings.append(rating)
        return {"saved": True, "agreement": self.agreement(rater)}

    def agreement(self, rater: str) -> list[dict[str, Any]]:
        """With each other rater, as figures only: nobody's verdicts are shown."""
        return [asdict(one) for one in pairs.agreements(self.samples, self.ratings) if rater in (one.first, one.second)]

    def export(self) -> str:
        """preference.jsonl as it is now."""
        self.ratings.refresh()
        return pairs.lines(pairs.preferences(self.samples, self.ratings, pairs.heard(self.ratings)).rows)

    def _known(self, rater: str) -> None:
        if self.rater is not None and rater != self.rater:
            raise Refused(HTTPStatus.FORBIDDEN, f"this page was opened for {self.rater}")
        if why := name_complaint(rater):
            raise Refused(HTTPStatus.BAD_REQUEST, why)


def _lists_of(positions: Any, answers: int) -> bool:
    groups = positions if isinstance(positions, list) else [None]
    return all(isinstance(group, list) and all(type(one) is int and 0 <= one < answers for one in group) for group in groups)


class Server(ThreadingHTTPServer):
    """Serves one page; `url` holds the secret."""

    daemon_threads = True

    def __init__(self, page: Page, port: int) -> None:
        self.page, self.secret, self.document = page, secrets.token_urlsafe(16), PAGE.read_bytes()
        self.policy = content_policy(self.document.decode())
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise RunError("--port", f"{port} cannot be opened: {getattr(error, 'strerror', None) or error}", "leave --port out to get a free one") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that was closed in the middle is no news; anything else is a bug and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def host(self) -> str:
        """The address as a browser names it."""
        return f"{ADDRESS}:{self.server_address[1]}"

    @property
    def url(self) -> str:
        """What a person opens."""
        return f"http://{self.host}/{self.secret}/"


def content_policy(document: str) -> str:
    """Only the page's own script and style run, known by their hashes; text of an answer can never become either."""
    hashes = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", document, re.DOTALL)
        hashes[tag] = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in found)
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; {rest}"


class Handler(BaseHTTPRequestHandler):
    """One request: check who asks, hand it to the page, answer in JSON."""

    server: Server
    timeout = QUIET_S
    server_version, sys_version = "lmforge", ""

    def do_GET(self) -> None:
        """The page, its data, the export."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A click."""
        self._answer(self._post)

    def _get(self) -> tuple[str, bytes]:
        path, query = self._path()
        page = self.server.page
        if path == "":
            return "text/html; charset=utf-8", self.server.document
        if path == "api/start":
            return _json(page.start())
        if path == "api/tasks":
            return _json(page.tasks(query.get("rater", [""])[0]))
        if path == "api/preference.jsonl":
            return "application/jsonl; charset=utf-8", page.export().encode()
        raise Refused(HTTPStatus.NOT_FOUND, "nothing here")

    def _post(self) -> tuple[str, bytes]:
        path, _ = self._path()
        if self.headers.get("Origin", f"http://{self.headers['Host']}") != f"http://{self.headers['Host']}":
            raise Refused(HTTPStatus.FORBIDDEN, "from another site")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "only JSON is read")
        if path != "api/rate":
            raise Refused(HTTPStatus.NOT_FOUND, "nothing here")
        return _json(self.server.page.rate(self._body()))

    def _path(self) -> tuple[str, dict[str, list[str]]]:
        """What follows the secret, and the query; Refused without the secret or under another host's name."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            raise Refused(HTTPStatus.FORBIDDEN, "not this host")
        parts = urlsplit(self.path)
        found = re.fullmatch(r"/([^/]*)/(.*)", parts.path)
        if found is None or not secrets.compare_digest(found[1].encode(), self.server.secret.encode()):
            raise Refused(HTTPStatus.NOT_FOUND, "open the address that the command printed")
        return found[2], parse_qs(parts.query)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the body's length is missing")
        if not re.fullmatch("[0-9]{1,7}", length):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body's length is no number of at most 7 digits")
        if int(length) > LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST_BODY} bytes")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "not JSON") from None

    def _answer(self, make: Any) -> None:
        status = HTTPStatus.OK
        try:
            kind, body = make()
        except Refused as refused:
            status = refused.status
            kind, body = _json({"error": refused.why})
        except LmforgeError as error:  # a full disk, a log that was edited: the page shows it, the server lives on
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            kind, body = _json({"error": str(error)})
        self._send(status, kind, body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the terminal shows what a person needs, not every request."""


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(value, allow_nan=False).encode()
