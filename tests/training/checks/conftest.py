"""Sound tokens for the tests of the checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("chats"), "chat", seq_len=16)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("pairs"), "preference", seq_len=24)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("answers"), "feedback")
