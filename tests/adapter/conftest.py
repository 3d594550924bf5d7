from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapter import tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A checkpoint to put adapters on."""
    return tiny.checkpoint_folder(tmp_path_factory.mktemp("base") / "checkpoint", tokenizer)
