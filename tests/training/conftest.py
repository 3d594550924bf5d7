"""Fixtures for the training tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for tiny_run

import tiny_run


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("tokens") / "chat", "chat")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("tokens") / "text", "text")


@pytest.fixture(scope="session")
def preference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("tokens") / "preference", "preference")


@pytest.fixture(scope="session")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("tokens") / "feedback", "feedback")
