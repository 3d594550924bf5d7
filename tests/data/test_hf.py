"""`data=hf` through `datasets.load_dataset` on local folders; the hub itself is never asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmforge.data.nodes import Data
from lmforge.errors import ConfigError, DataError
from lmforge.formats import corpus

Make, Run = Callable[..., Data], Callable[..., Path]
ROWS = [{"text": f"Story {index}."} for index in range(20)]


@pytest.fixture(params=["parquet", "jsonl"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data set folder with a train split of 20 stories."""
    found = tmp_path / "stories"
    found.mkdir()
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), found / "train.parquet")
    else:
        (found / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return found


def test_a_local_data_set(folder: Path, data: Make, run: Run) -> None:
    node = data("hf", name=str(folder), revision=None)
    assert node.views == ("text",)
    out = run(node)
    account = corpus.account(out)
    assert account.rows.plain() == {"in": 20, "kept": 20, "dropped": {}}
    texts = {row["text"] for split in corpus.SPLITS for row in corpus.read(out, "text", split)}
    assert texts == {row["text"] for row in ROWS}
    assert next(corpus.read(out, "text", "train"))["source"].startswith("stories[train]:")


def test_max_rows_takes_the_first(folder: Path, data: Make, run: Run) -> None:
    out = run(data("hf", name=str(folder), max_rows=5))
    assert {row["text"] for split in corpus.SPLITS for row in corpus.read(out, "text", split)} == {f"Story {index}." for index in range(5)}


def test_another_view_than_its_rows(folder: Path, data: Make, run: Run) -> None:
    with pytest.raises(DataError, match=r"stories\[train\]:1: no messages, conversations, .* every one of the 20 rows is bad"):
        run(data("hf", name=str(folder), view="chat"))


def test_chats_of_a_local_data_set(tmp_path: Path, data: Make, run: Run) -> None:
    (tmp_path / "chats").mkdir()
    rows = [{"prompt": f"Q{index}", "completion": f"A{index}"} for index in range(4)] + [{"prompt": "Q", "completion": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats" / "train.parquet")
    out = run(data("hf", name=str(tmp_path / "chats"), view="chat"))
    assert list(corpus.quarantined(out)) == [
        {"file": "chats[train]", "line": 5, "reason": "no messages, conversations, prompt + completion, or instruction + output"}
    ]
    assert corpus.account(out).views["chat"].kept == 4


def test_a_split_that_is_not_there_is_one_line(folder: Path, data: Make, run: Run) -> None:
    with pytest.raises(DataError, match=r"\[nope\]: cannot be read: .*nope") as caught:
        run(data("hf", name=str(folder), split="nope"))
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line(data: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"roneneldan/TinyStories\[train\]: cannot be read: ") as caught:
        run(data("hf"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "./no-such"}, "data.name: no such folder, and not a name on the hub: './no-such'; give owner/name or a folder"),
        ({"name": "a/b/c"}, "data.name: no such folder, and not a name on the hub"),
        ({"revision": None}, "data.revision: None is not a commit; pin the data"),
        ({"revision": "main"}, "data.revision: main is not a commit"),
        ({"view": "pictures"}, "data.view: 'pictures' is not one of text, chat, preference"),
        ({"max_rows": 0}, "data.max_rows: 0 must be >= 2"),
    ],
)
def test_bad_keys(change: dict[str, Any], message: str, data: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        data("hf", **change)
    assert message in str(caught.value)


def test_content_of_the_hub_is_its_commit_and_of_a_folder_its_files(folder: Path, data: Make) -> None:
    assert data("hf").content(None) == data("hf").content(None) != data("hf", revision="0" * 40).content(None)
    before = data("hf", name=str(folder)).content(None)
    moved = folder.rename(folder.with_name("moved"))
    assert data("hf", name=str(moved), revision=None).content(None) == before
    (moved / "more.jsonl").write_text('{"text": "more"}\n')
    assert data("hf", name=str(moved)).content(None) != before


def test_names_within_a_local_folder_are_content_because_splits_come_from_them(folder: Path, data: Make) -> None:
    before = data("hf", name=str(folder)).content(None)
    file = next(folder.iterdir())
    file.rename(file.with_stem("test"))
    assert data("hf", name=str(folder)).content(None) != before
