"""Data nodes as their YAML gives them, and a context to run them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode
from lmforge.data.nodes import Data
from lmforge.step import Context

CONF = Path(__file__).parents[2] / "conf" / "data"


def option(name: str, /, **values: Any) -> dict[str, Any]:
    """An option's keys from conf/data, with some of them changed."""
    plain = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    plain.pop("defaults", None)
    assert not values.keys() - plain.keys() - {"sources"}
    return plain | values


@pytest.fixture(scope="session")
def plain() -> Callable[..., dict[str, Any]]:
    """`plain(name, key=value...)`: an option's keys as plain data."""
    return option


@pytest.fixture(scope="session")
def data() -> Callable[..., Data]:
    """`data(name, key=value...)`: the decoded node."""

    def make(name: str, /, **values: Any) -> Data:
        node = decode(Data, option(name, **values), "data")
        assert isinstance(node, Data)
        return node

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Run a node; returns its corpus folder."""

    def go(node: Data, name: str = "corpus") -> Path:
        out = tmp_path / "run" / name
        out.mkdir(parents=True, exist_ok=True)
        node.run(Context(step="data", folder=tmp_path / "run", out=out, inputs={}))
        return out

    return go
