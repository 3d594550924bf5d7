"""The page's server by real requests on a loopback port: what it gives, what it keeps, and whom it refuses."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import RunError
from lmforge.ranking import blind
from lmforge.ranking.ratings import Ratings
from lmforge.ranking.server import ADDRESS, LARGEST_BODY, PAGE, Page, Server, content_policy

from .conftest import HOSTILE, SAMPLES

JSON = {"Content-Type": "application/json"}


@dataclass
class Said:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    def __init__(self, server: Server) -> None:
        self.server, self.port = server, server.server_address[1]
        self.root = f"/{server.secret}/"

    def get(self, path: str = "", **headers: str) -> Said:
        return self.send("GET", self.root + path, headers=headers)

    def rate(self, said: Any, path: str | None = None, headers: dict[str, str] | None = None) -> Said:
        return self.send("POST", path or f"{self.root}api/rate", json.dumps(said).encode(), JSON | (headers or {}))

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Said:
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=10)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        said = Said(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()
        return said


@pytest.fixture
def client(ratings: Ratings) -> Iterator[Client]:
    yield from serving(ratings, None)


def serving(ratings: Ratings, rater: str | None) -> Iterator[Client]:
    with Server(Page(SAMPLES, ratings, rater), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()


def click(name: str, places: list[list[int]], state: str, rater: str = "ann", **more: Any) -> dict[str, Any]:
    return {"rater": rater, "id": name, "places": places, "state": state, **more}


def test_it_listens_on_loopback_only_and_the_address_holds_a_secret(client: Client) -> None:
    assert client.server.server_address[0] == "127.0.0.1"
    assert re.fullmatch(rf"http://127\.0\.0\.1:{client.port}/[\w-]{{20,}}/", client.server.url)


def test_the_page_is_one_file_that_asks_for_nothing_elsewhere(client: Client) -> None:
    said = client.get()
    page = said.body.decode()
    assert said.status == 200
    assert page == PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    assert "innerHTML" not in page
    assert "eval(" not in page
    attributes = Attributes()
    attributes.feed(page)
    assert not [name for name in attributes.names if name.startswith("on") or name == "style"]  # the policy would stop them
    assert said.headers["Cache-Control"] == "no-store"
    assert said.headers["Referrer-Policy"] == "no-referrer"
    assert said.headers["X-Content-Type-Options"] == "nosniff"


class Attributes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names += [name for name, _ in attrs]
        if tag in ("input", "button", "dialog", "progress"):
            given = dict(attrs)
            assert tag not in ("dialog", "progress") or {"aria-label", "aria-labelledby"} & given.keys()


def test_only_the_pages_own_script_may_run(client: Client) -> None:
    policy = client.get().headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy == content_policy(client.get().body.decode())
    assert re.search(r"script-src 'sha256-[\w+/]{43}=';", policy)
    assert policy != content_policy(client.get().body.decode().replace("</script>", " </script>"))


def test_a_hostile_answer_travels_as_data(client: Client) -> None:
    said = client.get("api/tasks?rater=ann")
    assert said.headers["Content-Type"].startswith("application/json")
    task = next(one for one in said.json["tasks"] if one["id"] == "train-6")
    assert HOSTILE in [answer["text"] for answer in task["answers"]]
    assert task["prompt"][1] == {"role": "user", "text": HOSTILE}
    assert HOSTILE.encode() not in client.get().body


def test_the_order_is_blind_stable_and_each_raters_own(client: Client) -> None:
    def texts(rater: str) -> list[list[str]]:
        return [[answer["text"] for answer in task["answers"]] for task in client.get(f"api/tasks?rater={rater}").json["tasks"]]

    assert texts("ann") == texts("ann")
    assert len({json.dumps(texts(f"rater{number}")) for number in range(8)}) > 3
    assert sorted(texts("ann")[0]) == sorted(answer.text for answer in SAMPLES[0].answers)
    raw = client.get("api/tasks?rater=ann").body.decode()
    assert "logprob" not in raw
    assert "tokens" not in raw
    firsts = [blind.order(SAMPLES[0], f"rater{number}")[0] for number in range(300)]
    assert all(70 < firsts.count(place) < 130 for place in range(3))  # a hash favours no answer


def test_clicks_are_saved_at_once_in_the_samples_order_and_resumed(client: Client, ratings: Ratings) -> None:
    seen = blind.order(SAMPLES[0], "ann")
    assert client.rate(click("train-0", [[1]], "open")).json["saved"]
    assert json.loads(ratings.file.read_text())["places"] == [[seen[1]]]
    client.rate(click("train-0", [[1], [0, 2]], "ranked"))
    assert Ratings(ratings.file, SAMPLES).of("ann")["train-0"].places == ((seen[1],), (seen[0], seen[2]))
    again = client.get("api/tasks?rater=ann").json
    task = next(one for one in again["tasks"] if one["id"] == "train-0")
    assert (task["places"], task["state"]) == ([[1], [0, 2]], "ranked")
    assert again["history"] == [{"id": "train-0", "places": [], "state": "open"}, {"id": "train-0", "places": [[1]], "state": "open"}]
    client.rate(click("train-0", [[1]], "open", undo=True))
    assert len(client.get("api/tasks?rater=ann").json["history"]) == 1
    assert client.get("api/start").json == {"rater": None, "raters": [], "prompts": 3}
    assert again["left_out"] == 1


def test_two_raters_see_their_agreement_and_not_each_others_verdicts(client: Client) -> None:
    for rater, order in {"ann": [0, 1, 2], "bob": [0, 2, 1]}.items():
        seen = blind.order(SAMPLES[0], rater)
        said = client.rate(click("train-0", [[seen.index(place)] for place in order], "ranked", rater))
    [agreement] = said.json["agreement"]
    assert (agreement["first"], agreement["second"], agreement["pairs"]) == ("ann", "bob", 3)
    assert agreement["raw"] == pytest.approx(2 / 3)
    assert agreement["kappa"] == pytest.approx(0)
    assert client.get("api/tasks?rater=cid").json["agreement"] == []
    assert "ann" not in client.get("api/tasks?rater=cid").body.decode()
    rows = [json.loads(line) for line in client.get("api/preference.jsonl").body.decode().splitlines()]
    assert [row["source"] for row in rows] == ["train-0:0-1", "train-0:0-2"]


def test_the_secret_is_needed_everywhere(client: Client, ratings: Ratings) -> None:
    for path in ("/", "/api/start", "/wrong/", "/wrong/api/tasks?rater=ann", client.root.rstrip("/"), "//", "/%00/"):
        assert client.send("GET", path).status == 404
    assert client.rate(click("train-0", [[0]], "open"), path="/wrong/api/rate").status == 404
    assert client.rate(click("train-0", [[0]], "open"), path="/api/rate").status == 404
    assert not ratings.file.exists()


def test_another_hosts_name_and_another_sites_post_are_refused(client: Client, ratings: Ratings) -> None:
    """DNS rebinding brings the name of the attacker's host; a form of another site brings its origin, or is not JSON."""
    for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1", f"[::1]:{client.port}"):
        assert client.get("api/start", Host=host).status == 403
    assert client.get("api/start", Host=f"localhost:{client.port}").status == 200
    good = click("train-0", [[0]], "open")
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{client.port + 1}"):
        assert client.rate(good, headers={"Origin": origin}).status == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.rate(good, headers={"Content-Type": kind}).status == 415
    assert not ratings.file.exists()
    assert client.rate(good, headers={"Origin": f"http://127.0.0.1:{client.port}"}).status == 200


def test_a_body_too_large_or_broken_is_refused(client: Client, ratings: Ratings) -> None:
    path = f"{client.root}api/rate"
    assert client.send("POST", path, b"{" * 100, JSON).status == 400
    assert client.send("POST", path, b"[" * 60_000, JSON).status == 400
    assert client.send("POST", path, b"\xff\xfe", JSON).status == 400
    head = f"POST {path} HTTP/1.1\r\nHost: {client.server.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((ADDRESS, client.port), timeout=10) as raw:  # says so much and sends none of it: refused without reading
        raw.sendall(f"{head}Content-Length: {LARGEST_BODY + 1}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(4096)
    with socket.create_connection((ADDRESS, client.port), timeout=10) as raw:
        raw.sendall(f"{head}\r\n".encode())
        assert b" 411 " in raw.recv(4096)
    for length in ("-1", "+1", "1e3", "", "12345678", "9" * 5000, "\u0661\u0662"):
        with socket.create_connection((ADDRESS, client.port), timeout=10) as raw:
            raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert b" 400 " in raw.recv(4096), length
    assert client.send("PUT", path, b"{}", JSON).status == 501
    assert not ratings.file.exists()


@pytest.mark.parametrize(
    "said",
    [
        [],
        {},
        click("nobody", [[0]], "open"),
        click("train-9", [[0]], "ranked"),  # nothing to choose from: not on the page
        click("train-0", [[0], [0]], "open"),
        click("train-0", [[3]], "open"),
        click("train-0", [[-1]], "open"),
        click("train-0", [[]], "open"),
        click("train-0", [[0]], "ranked"),
        click("train-0", [[0], [1], [2]], "open"),
        click("train-0", [[0]], "skipped"),
        click("train-0", [[0]], "elsewhere"),
        click("train-0", "012", "ranked"),  # type: ignore[arg-type]
        click("train-0", [["x"]], "open"),  # type: ignore[list-item]
        click("train-0", [[True]], "open"),
        click("train-0", [[0.0]], "open"),  # type: ignore[list-item]
        click("train-0", {"0": 1}, "open"),  # type: ignore[arg-type]
        click(["train-0"], [[0]], "open"),  # type: ignore[arg-type]
        click("train-0", [[0]], ["open"]),  # type: ignore[arg-type]
        click("train-0", [[0]], "open", rater=""),
        click("train-0", [[0]], "open", rater="reward:length"),
        {"rater": 3, "id": "train-0", "places": [], "state": "open"},
    ],
)
def test_a_click_that_makes_no_sense_is_refused_and_not_kept(client: Client, ratings: Ratings, said: Any) -> None:
    answer = client.rate(said)
    assert answer.status == 400
    assert answer.json["error"]
    assert not ratings.file.exists()


def test_a_page_opened_for_one_rater_takes_no_other(ratings: Ratings) -> None:
    for client in serving(ratings, "ann"):
        assert client.get("api/start").json["rater"] == "ann"
        assert client.rate(click("train-0", [[0]], "open", rater="bob")).status == 403
        assert client.get("api/tasks?rater=bob").status == 403
        assert client.rate(click("train-0", [[0]], "open")).status == 200


def test_a_disk_that_refuses_is_said_and_the_page_lives_on(client: Client, ratings: Ratings) -> None:
    ratings.file.mkdir()
    said = client.rate(click("train-0", [[0]], "open"))
    assert said.status == 500
    assert "cannot be written" in said.json["error"]
    ratings.file.rmdir()
    assert client.rate(click("train-0", [[0]], "open")).status == 200


def test_a_port_in_use_is_one_line(client: Client, ratings: Ratings) -> None:
    with pytest.raises(RunError, match=f"{client.port} cannot be opened"):
        Server(Page(SAMPLES, ratings, None), client.port)


def test_many_clicks_at_once_are_all_kept(client: Client, ratings: Ratings, tmp_path: Path) -> None:
    raters = [f"rater{number}" for number in range(8)]

    def rank(name: str) -> None:
        for number in range(6):
            client.rate(click("train-0", [[number % 3]], "open", name))

    threads = [threading.Thread(target=rank, args=(name,)) for name in raters]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    rows = [json.loads(line) for line in ratings.file.read_text().splitlines()]
    assert all(sum(row["rater"] == name for row in rows) == 6 for name in raters)
