"""Whether W&B goes online, for each way of being logged in or not, with a real local socket as the server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmforge.track import login
from lmforge.track.guard import one_line

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    login.reachable.cache_clear()


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", where)
        yield where


def test_nobody_logged_in_is_offline_and_only_online_says_so() -> None:
    assert login.choose("auto") == ("offline", "")
    assert login.choose("offline") == ("offline", "")
    assert login.choose("disabled") == ("disabled", "")
    assert login.choose("online") == ("offline", "nobody is logged in")


@pytest.mark.usefixtures("address")
def test_a_key_in_the_environment_is_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert login.choose("auto") == ("online", "")
    assert login.choose("offline") == ("offline", "")


@pytest.mark.usefixtures("address")
def test_a_netrc_entry_is_a_login_for_its_own_server_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = login.server().removeprefix("http://")
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert login.choose("auto")[0] == "offline"
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {KEY}\n")
    assert login.choose("auto")[0] == "online"
    monkeypatch.setenv("NETRC", str(tmp_path / "elsewhere"))  # such as none
    assert login.choose("auto")[0] == "offline"


def test_an_old_login_to_the_public_server_counts(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    assert not login.logged_in()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert login.logged_in()


@pytest.mark.usefixtures("address")
def test_wandbs_own_mode_rules_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert login.choose("auto")[0] == "disabled"
    assert login.choose("online")[0] == "online"


def test_a_server_that_is_not_there_costs_little_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")  # closed again: refuses
    start = time.perf_counter()
    assert login.choose("auto") == ("offline", f"http://127.0.0.1:{port} does not answer")
    login.reachable.cache_clear()
    monkeypatch.setenv("WANDB_BASE_URL", "http://192.0.2.1")  # TEST-NET-1, RFC 5737: nobody is there
    assert login.choose("auto")[0] == "offline"
    assert time.perf_counter() - start < 4


def test_a_key_never_reaches_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert one_line(ValueError(f"bad key\n {KEY}!")) == "ValueError: bad key <WANDB_API_KEY>!"
