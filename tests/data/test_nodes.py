"""What holds for every option of `data`: YAML and class have the same keys, the codec round-trips, and planning stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode, keys
from lmforge.data.nodes import Data
from lmforge.formats import corpus
from lmforge.registry import types

CONF = Path(__file__).parents[2] / "conf" / "data"


def test_every_type_has_an_option_with_all_its_keys_commented() -> None:
    files = sorted(CONF.glob("*.yaml"))
    assert {yaml.safe_load(path.read_text())["type"] for path in files} == set(types("data"))
    for path in files:
        plain = yaml.safe_load(path.read_text())
        filled = {"sources"} if plain.pop("defaults", None) else set()  # by the defaults list
        assert plain.keys() | filled == keys(types("data")[plain["type"]]).keys() | {"type"}
        for line in path.read_text().splitlines():
            assert line.strip().startswith(("type:", "#", "exclude:", "defaults:", "- ")) or "#" in line, line


def test_nodes_round_trip_through_json(data: Callable[..., Data], plain: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    text = plain("text", path=str(tmp_path))
    mixture = data("mixture", sources={"code": plain("pystdlib"), "own": text})
    for node in (data("pystdlib"), data("hf"), data("text", path=str(tmp_path)), mixture):
        assert decode(Data, json.loads(json.dumps(encode(node))), "data") == node
    assert str(tmp_path) not in json.dumps(encode(mixture, identity=True))  # where it lies is not what it is


def test_what_a_view_can_be_made_of(data: Callable[..., Data]) -> None:
    offers = {view: data("pystdlib").offers(view) for view in corpus.VIEWS}
    assert offers == {"text": "text", "chat": "chat", "preference": "preference", "feedback": "preference", "prompt": "chat"}
    assert [data("hf", view="feedback").offers(view) for view in corpus.VIEWS] == [None, None, None, "feedback", "feedback"]
    assert [data("hf").offers(view) for view in corpus.VIEWS] == ["text", None, None, None, None]


def test_planning_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    code = f"""
import sys, yaml
from lmforge.codec import decode
from lmforge.data.nodes import Data
for name, more in (("pystdlib", {{}}), ("hf", {{}}), ("text", {{"path": {str(tmp_path)!r}}})):
    node = decode(Data, yaml.safe_load(open({str(CONF)!r} + "/" + name + ".yaml")) | more, "data")
    node.views, node.content(None)
print(*sorted({{"torch", "numpy", "datasets", "pyarrow", "transformers", "lmforge.data.mutate"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["pystdlib", "text", "hf", "mixture"])
def test_every_option_says_what_it_is_in_one_line(name: str) -> None:
    assert len((types("data")[name].__doc__ or "").splitlines()) == 1
