"""The corpus folder: atomic, readable, and never with an account that does not add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmforge.errors import DataError
from lmforge.formats import corpus


def write(out: Path, words: tuple[str, ...] = ("one", "two", "three")) -> None:
    with corpus.Writer(out) as writer:
        rows, tally = writer.account.rows, writer.account.view("text")
        for index, word in enumerate(words):
            rows.entered += 1
            tally.entered += 1
            rows.kept += 1
            tally.kept += 1
            writer.write("text", "heldout" if index == 0 else "train", {"text": word, "source": f"f:{index}"})
        rows.entered += 1
        rows.dropped["broken_json"] += 1
        writer.quarantine("f", 7, "broken JSON")


def test_round_trip(tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    out.mkdir()  # the runner makes it empty
    write(out, ("one", "zwei\u2028\n\tλ", "three"))
    assert [row["text"] for row in corpus.read(out, "text", "train")] == ["zwei\u2028\n\tλ", "three"]
    assert [row["text"] for row in corpus.read(out, "text", "heldout")] == ["one"]
    assert corpus.views(out) == ("text",)
    assert list(corpus.quarantined(out)) == [{"file": "f", "line": 7, "reason": "broken JSON"}]
    account = corpus.account(out)
    assert account.plain() == {
        "in": 4,
        "kept": 3,
        "dropped": {"broken_json": 1},
        "views": {"text": {"in": 3, "kept": 3, "dropped": {}, "train": 2, "heldout": 1, "repeated": 0}},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


@pytest.mark.parametrize("lost", ["row", "line"])
def test_an_account_that_does_not_add_up_is_never_written(tmp_path: Path, lost: str) -> None:
    writer = corpus.Writer(tmp_path / "corpus").__enter__()
    writer.account.rows.entered += 1
    writer.account.rows.kept += lost == "line"
    writer.account.view("text").entered += lost == "line"
    writer.account.view("text").kept += lost == "line"
    with pytest.raises(AssertionError, match="account"):
        writer.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_corpus_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "corpus")
    with pytest.raises(ZeroDivisionError), corpus.Writer(tmp_path / "corpus") as writer:
        writer.write("text", "train", {"text": str(1 / 0)})
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert corpus.account(tmp_path / "corpus").rows.kept == 3


def test_a_second_write_replaces_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".corpus.tmp" / "chat").mkdir(parents=True)
    (tmp_path / "corpus" / "chat").mkdir(parents=True)
    write(tmp_path / "corpus")
    assert corpus.views(tmp_path / "corpus") == ("text",)


def test_a_view_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "corpus")
    with pytest.raises(DataError, match="no chat/train rows in this corpus; it offers: text"):
        corpus.read(tmp_path / "corpus", "chat", "train")
    with pytest.raises(DataError, match="not a corpus"):
        corpus.account(tmp_path)


def test_an_edited_account_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "corpus")
    path = tmp_path / "corpus" / "account.json"
    path.write_text(path.read_text().replace('"kept": 3', '"kept": 2', 1))
    with pytest.raises(AssertionError, match="does not add up"):
        corpus.account(tmp_path / "corpus")


def test_what_a_view_of_tokens_is_read_from() -> None:
    assert corpus.source_view("text", ("chat",)) is None
    assert corpus.source_view("chat", ("text", "chat")) == "chat"
    assert corpus.source_view("feedback", ("chat", "preference")) == "preference"
    assert corpus.source_view("feedback", ("feedback", "preference")) == "feedback"
    assert corpus.source_view("prompt", ("feedback", "preference", "chat")) == "chat"
    assert corpus.source_view("prompt", ("feedback",)) == "feedback"
    assert corpus.source_view("prompt", ("text",)) is None


def test_every_view_is_written_and_counted(tmp_path: Path) -> None:
    with corpus.Writer(tmp_path / "corpus") as writer:
        for view in reversed(corpus.VIEWS):
            for total in (writer.account.rows, writer.account.view(view)):
                total.entered += 1
                total.kept += 1
            writer.write(view, "train", {"source": view})
    assert corpus.views(tmp_path / "corpus") == corpus.VIEWS
    assert tuple(corpus.account(tmp_path / "corpus").plain()["views"]) == corpus.VIEWS
