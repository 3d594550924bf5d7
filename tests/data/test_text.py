"""`data=text`: every dialect, planted bad rows by file and line, missing paths, and content by content."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
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
PAIR = [{"role": "user", "content": "Q{0}?"}, {"role": "assistant", "content": "A{0}."}]
SHAREGPT = [{"from": "human", "value": "Q{0}?"}, {"from": "gpt", "value": "A{0}."}]
LISTED = {"chosen": [*PAIR], "rejected": [PAIR[0], {"role": "assistant", "content": "B{0}."}]}


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(row: Any, count: int = 12) -> list[Any]:
    text = json.dumps(row)
    return [json.loads(text.replace("{0}", str(index))) for index in range(count)]


def rows(folder: Path, view: str) -> list[dict[str, Any]]:
    return [row for split in corpus.SPLITS for row in corpus.read(folder, view, split)]


def turn(role: str, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
OPENAI = [
    PAIR[0],
    turn("assistant", None, tool_calls=[{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]),
    turn("tool", "2", name="add", tool_call_id="c1"),
    PAIR[1],
]
FUNCTIONS = [
    SHAREGPT[0],
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "2"},
    SHAREGPT[1],
]
LONG = [turn("system", "Be brief."), turn("user", "Hi {0}"), turn("assistant", "Hello"), PAIR[0]]
LONG3 = numbered(LONG)[3]
ANSWERED = {"prompt": "Q3?", "chosen": "A3.", "rejected": "B3."}
WHOLE = {"chosen": [*LONG, turn("assistant", "A{0}.")], "rejected": [*LONG, turn("assistant", "B{0}.")]}
DIALECTS = [
    ("text", {"text": "Words {0}."}, {"text": "Words 3."}),
    ("chat", {"messages": PAIR}, {"messages": numbered(PAIR)[3]}),
    ("chat", {"conversations": SHAREGPT}, {"messages": numbered(PAIR)[3]}),
    ("chat", {"prompt": "Q{0}?", "completion": "A{0}."}, {"messages": numbered(PAIR)[3]}),
    ("chat", {"prompt": PAIR[:1], "completion": PAIR[1:]}, {"messages": numbered(PAIR)[3]}),
    ("chat", {"instruction": "Q{0}?", "input": "", "output": "A{0}."}, {"messages": numbered(PAIR)[3]}),
    ("chat", {"instruction": "Add", "input": "{0}", "output": "A{0}."}, {"messages": [{"role": "user", "content": "Add\n\n3"}, numbered(PAIR)[3][1]]}),
    (
        "chat",
        {"messages": OPENAI},
        {
            "messages": [
                numbered(PAIR)[3][0],
                turn("assistant", "", tool_calls=[{"id": "c1"} | CALL]),
                turn("tool", "2", name="add", tool_call_id="c1"),
                numbered(PAIR)[3][1],
            ]
        },
    ),
    (
        "chat",
        {"conversations": FUNCTIONS},
        {"messages": [numbered(PAIR)[3][0], turn("assistant", "", tool_calls=[CALL]), turn("tool", "2"), numbered(PAIR)[3][1]]},
    ),
    ("preference", {"prompt": "Q{0}?", "chosen": "A{0}.", "rejected": "B{0}."}, ANSWERED),
    ("preference", {"prompt": "Q{0}?", "chosen": "A{0}.", "rejected": "B{0}.", "margin": 0.5}, ANSWERED | {"margin": 0.5}),
    ("preference", {"prompt": "Q{0}?", **LISTED}, ANSWERED),
    ("preference", LISTED, ANSWERED),
    ("preference", {"prompt": PAIR[:1], "chosen": [PAIR[1]], "rejected": [turn("assistant", "B{0}.")]}, ANSWERED),
    ("preference", {"prompt": LONG, "chosen": "A{0}.", "rejected": "B{0}."}, ANSWERED | {"prompt": LONG3}),
    ("preference", WHOLE, ANSWERED | {"prompt": LONG3}),
    ("preference", {"prompt": "Q{0}?", **WHOLE}, ANSWERED | {"prompt": LONG3}),
    ("feedback", {"prompt": "Q{0}?", "completion": "A{0}.", "label": True}, {"prompt": "Q3?", "completion": "A3.", "label": True}),
    ("feedback", {"prompt": LONG, "completion": [PAIR[1]], "label": False}, {"prompt": LONG3, "completion": "A3.", "label": False}),
    ("prompt", {"prompt": "Q{0}?"}, {"prompt": "Q3?", "answer": None}),
    ("prompt", {"prompt": LONG, "answer": "{0}"}, {"prompt": LONG3, "answer": "3"}),
    ("prompt", {"prompt": "Q{0}?", "solution": "{0}"}, {"prompt": "Q3?", "answer": "3"}),
    ("prompt", {"prompt": "Q{0}?", "ground_truth": 7.5}, {"prompt": "Q3?", "answer": "7.5"}),
    ("prompt", {"question": "Q{0}?", "answer": "A{0}."}, {"prompt": "Q3?", "answer": "A3."}),
]


SINGLE = {view: (view, row, wanted) for view, row, wanted in reversed(DIALECTS)}  # the first of each view


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("view", "row", "wanted"), DIALECTS)
def test_dialects(form: str, view: str, row: Any, wanted: Any, tmp_path: Path, data: Make, run: Run) -> None:
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(numbered(row)), path)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(tmp_path / "plain", *numbered(row)).read_bytes()))
    else:
        jsonl(path, *numbered(row))
    node = data("text", path=str(path))
    assert node.views == (view,)
    out = run(node)
    assert wanted | {"source": f"rows.{form}:4"} in rows(out, view)
    tally = corpus.account(out).views[view]
    assert (tally.kept, tally.train > 0, tally.heldout > 0) == (12, True, True)


BAD: list[tuple[bytes, str, str]] = [
    (b'{"text": "cut', "broken_json", "broken JSON"),
    (b"\xff\xfe", "not_utf8", "not UTF-8 at byte 1"),
    (b'{"text": "caf\xe9"}', "not_utf8", "not UTF-8 at byte 14"),
    (b'{"txt": "x"}', "missing_field", "no known fields (has: txt"),
    (b'{"text": 7}', "wrong_type", "text is int, not text"),
    (b'{"text": null}', "missing_field", "text is missing"),
    (b'{"text": " "}', "empty", "text is empty"),
    (b'{"text": "\\ud800"}', "not_utf8", "surrogate"),
    (b"[1, 2]", "wrong_type", "expected an object, got list"),
    (b"[" * 100_000, "broken_json", ""),
    (b'{"messages": "hi"}', "wrong_type", "messages is str, not a list"),
    (b'{"messages": []}', "empty_conversation", "messages is empty"),
    (b'{"messages": [{"role": "user", "content": "hi"}]}', "no_assistant_turn", "no assistant turn"),
    (b'{"messages": [{"role": "assistant", "content": "hi"}]}', "turn_order", "messages[0]: begins with the assistant"),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        "turn_order",
        "messages[1]: two user turns in a row",
    ),
    (
        b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "system", "value": "s"}]}',
        "turn_order",
        "conversations[2]: a system turn right after an assistant turn",
    ),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "robot", "content": "a"}]}', "unknown_role", "messages[1].role is 'robot'"),
    (b'{"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]}', "empty", "messages[0].content is empty"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}', "empty", "messages[1].content is empty"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"id": "x"}]}]}', "wrong_type", "messages[1].tool_calls[0] is not"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": "x"}]}', "wrong_type", "tool_calls is str, not a list"),
    (b'{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "add(1)"}]}', "wrong_type", "is not a call of a named function"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}', "missing_field", "messages[1].content is missing"),
    (b'{"messages": [7]}', "wrong_type", "messages[0] is int"),
    (b'{"instruction": "q", "output": ""}', "empty", "output is empty"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "a"}', "chosen_is_rejected", "the same"),
    (b'{"chosen": "a", "rejected": "b"}', "missing_field", "prompt is missing"),
    (b'{"prompt": "q", "chosen": [], "rejected": "b"}', "empty_conversation", "chosen is empty"),
    (b'{"prompt": "q", "chosen": [{"role": "user", "content": "q"}], "rejected": "b"}', "no_assistant_turn", "chosen does not end with the assistant"),
    (b'{"prompt": "q", "chosen": ["a"], "rejected": "b"}', "wrong_type", "chosen[0] is str"),
    (b'{"chosen": [{"role": "assistant"}], "rejected": "b"}', "missing_field", "chosen[0].content is missing"),
    (b'{"prompt": [1], "chosen": "a", "rejected": "b"}', "wrong_type", "prompt[0] is int, not an object"),
    (b'{"prompt": "q", "chosen": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "a"}], "rejected": "b"}', "different_prompts", "answer"),
    (
        b'{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],'
        b' "rejected": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}',
        "different_prompts",
        "chosen and rejected do not answer the same prompt",
    ),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": "wide"}', "wrong_type", "margin is 'wide', not a number"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}', "wrong_type", "margin is nan, not a number"),
    (b'{"prompt": "q", "completion": "a", "label": "yes"}', "label_not_boolean", "label is 'yes', not a boolean"),
    (b'{"prompt": "q", "completion": "a", "label": 1}', "label_not_boolean", "label is 1, not a boolean"),
    (b'{"prompt": "q", "completion": "a", "label": null}', "label_not_boolean", "label is missing, not a boolean"),
    (b'{"prompt": "q", "completion": "", "label": true}', "empty", "completion is empty"),
    (b'{"prompt": []}', "empty_conversation", "prompt is empty"),
    (b'{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', "turn_order", "prompt ends with the assistant"),
    (b'{"question": "q", "answer": ["a"]}', "wrong_type", "answer is list, not text"),
]


@pytest.mark.parametrize(("bad", "kind", "reason"), BAD, ids=[one[1] + str(index) for index, one in enumerate(BAD)])
def test_a_bad_row_is_counted_and_quarantined_by_file_and_line(bad: bytes, kind: str, reason: str, tmp_path: Path, data: Make, run: Run) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    good = [json.dumps(row).encode() for row in numbered({"text": "Words {0}."})]
    (folder / "sub" / "b.jsonl").write_bytes(b"\n".join([*good[:5], b"", bad, *good[5:], good[0]]))
    out = run(data("text", path=str(folder)))
    (found,) = corpus.quarantined(out)
    assert (found["file"], found["line"]) == ("sub/b.jsonl", 7)
    assert reason in found["reason"]
    assert corpus.account(out).rows.plain() == {"in": 14, "kept": 12, "dropped": {"duplicate": 1, kind: 1}}


def test_all_rows_bad_names_the_first(tmp_path: Path, data: Make, run: Run) -> None:
    jsonl(tmp_path / "in" / "a.jsonl", "", '{"text": 1}', "{")
    with pytest.raises(DataError) as caught:
        run(data("text", path=str(tmp_path / "in")))
    assert str(caught.value) == "data error: a.jsonl:2: text is int, not text; every one of the 2 rows is bad, and this is the first"
    assert list((tmp_path / "run" / "corpus").iterdir()) == []


def test_broken_files_are_bad_rows(tmp_path: Path, data: Make, run: Run) -> None:
    folder = tmp_path / "in"
    jsonl(folder / "a.jsonl", *numbered({"text": "Words {0}."}))
    (folder / "b.parquet").write_bytes(b"PAR1 no")
    whole = gzip.compress("".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(2000)).encode())
    (folder / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "d.txt.gz").write_bytes(b"no gzip at all")
    out = run(data("text", path=str(folder)))
    bad = {row["file"]: row for row in corpus.quarantined(out)}
    assert bad.keys() == {"b.parquet", "c.jsonl.gz", "d.txt.gz"}
    assert bad["b.parquet"]["line"] == 0
    assert bad["c.jsonl.gz"]["line"] > 100
    assert corpus.account(out).rows.dropped == {"unreadable": 3}


def test_one_document_cannot_be_held_out(tmp_path: Path, data: Make, run: Run) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "only"}, {"text": "only"})
    with pytest.raises(DataError, match="only one distinct document"):
        run(data("text", path=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("count", [2, 3, 40])
def test_both_splits_have_rows_even_of_two_documents(count: int, tmp_path: Path, data: Make, run: Run) -> None:
    jsonl(tmp_path / "a.jsonl", *numbered({"text": "Words {0}."}, count))
    for fraction in (0.001, 0.999):
        out = run(data("text", path=str(tmp_path / "a.jsonl"), heldout_fraction=fraction))
        tally = corpus.account(out).views["text"]
        assert (tally.heldout, tally.train) == ((1, count - 1) if fraction < 0.5 else (count - 1, 1))


def test_one_prompt_never_stands_in_both_splits(tmp_path: Path, data: Make, run: Run) -> None:
    answers = [{"prompt": f"Q{index % 30}", "chosen": f"good {index}", "rejected": f"bad {index}"} for index in range(300)]
    jsonl(tmp_path / "a.jsonl", *answers)
    out = run(data("text", path=str(tmp_path / "a.jsonl"), heldout_fraction=0.3))
    train, heldout = ({row["prompt"] for row in corpus.read(out, "preference", split)} for split in corpus.SPLITS)
    assert not train & heldout
    assert (len(train) + len(heldout), len(heldout) > 3) == (30, True)


def test_several_views_in_one_folder(tmp_path: Path, data: Make, run: Run) -> None:
    jsonl(tmp_path / "in" / "a.jsonl", *(row for one in (DIALECTS[0], DIALECTS[1], SINGLE["preference"]) for row in numbered(one[1])))
    (tmp_path / "in" / "b.txt").write_text("More words.\n")
    node = data("text", path=str(tmp_path / "in"))
    assert node.views == ("text", "chat")  # a plan looks at sixteen rows of a file: the pairs come later
    jsonl(tmp_path / "in" / "d.jsonl", SINGLE["preference"][1])
    assert node.views == corpus.views(run(node)) == ("text", "chat", "preference")
    assert [node.offers(view) for view in corpus.VIEWS] == ["text", "chat", "preference", "preference", "chat"]
    jsonl(tmp_path / "in" / "e.jsonl", *(row for view in ("feedback", "prompt") for row in numbered(SINGLE[view][1])[:8]))
    assert node.views == corpus.views(run(node)) == corpus.VIEWS
    assert [node.offers(view) for view in corpus.VIEWS] == list(corpus.VIEWS)


def test_a_long_txt_is_cut_into_documents_and_nothing_is_lost(tmp_path: Path, data: Make, run: Run) -> None:
    paragraphs = [f"Paragraph {index} " + "word " * (index % 40) for index in range(200)] + ["x" * 1000]
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff".encode() + "\r\n\r\n".join(paragraphs).encode())
    out = run(data("text", path=str(path), txt_document_chars=400))
    found = {int(row["source"].rpartition(":")[2]): row["text"] for row in rows(out, "text") if row["text"][0] != "x"}
    assert "\n\n".join(found[line].strip("\n") for line in sorted(found)) == "\n\n".join(paragraphs[:-1])
    texts = [row["text"] for row in rows(out, "text")]
    assert all(len(text) <= 400 for text in texts)
    assert sum(text.count("x") for text in texts if text[0] == "x") == 400 + 200  # the two equal pieces of 400 are duplicates


def test_a_bad_line_spoils_its_txt_document_only(tmp_path: Path, data: Make, run: Run) -> None:
    lines = [f"line {index} of a text".encode() for index in range(100)]
    lines[49] = b"\xff"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    out = run(data("text", path=str(tmp_path / "a.txt"), txt_document_chars=100))
    assert list(corpus.quarantined(out)) == [{"file": "a.txt", "line": 50, "reason": "not UTF-8 at byte 1 of the line"}]
    text = "\n".join(row["text"] for row in rows(out, "text"))
    assert "line 40 " in text
    assert "line 60 " in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "data.path: must be set; give a file, or a folder with files that end in .txt, .txt.gz, .jsonl, .jsonl.gz, .parquet"),
        (lambda path: str(path / "no"), "no such file or folder: '"),
        (lambda path: str(path), "no usable file: '"),
        (lambda path: (path / "a.csv").write_text("a,b") and str(path / "a.csv"), "no usable file: '"),
        (lambda path: (path / "a.txt").write_text("") or str(path), "only empty files: '"),
    ],
)
def test_missing_and_empty_paths_show_in_the_plan(make: Callable[[Path], str | None], message: str, tmp_path: Path, data: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        data("text", path=make(tmp_path))
    assert str(caught.value).startswith("conf error: data.path: ")
    assert message in str(caught.value)
    assert ".jsonl" in str(caught.value)


def test_content_is_of_the_content(tmp_path: Path, data: Make) -> None:
    cache, folder = tmp_path / "cache.json", tmp_path / "in"
    jsonl(folder / "a.jsonl", {"text": "one"})
    jsonl(folder / "sub" / "b.jsonl", {"text": "two"})
    digest = data("text", path=str(folder)).content(cache)
    folder.rename(tmp_path / "moved")
    moved = data("text", path=str(tmp_path / "moved"))
    assert moved.content(cache) == moved.content(None) == digest
    path = tmp_path / "moved" / "a.jsonl"
    before = path.stat()
    jsonl(path, {"text": "owe"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same mtime, other content
    assert moved.content(cache) == moved.content(None) != digest
    jsonl(path, {"text": "one"})
    assert moved.content(cache) == digest
    path.rename(path.with_suffix(".txt"))  # the same bytes read in another way
    assert moved.content(cache) != digest


def test_the_cache_is_used_and_a_broken_one_is_not_fatal(tmp_path: Path, data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache.json"
    jsonl(tmp_path / "a.jsonl", {"text": "one"})
    node = data("text", path=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr("lmforge.formats.manifest.SETTLED_NS", -1)
    digest = node.content(cache)
    known = json.loads(cache.read_text())
    (entry,) = known.values()
    entry[3] = "0" * 64
    cache.write_text(json.dumps(known))
    assert node.content(cache) != digest  # it believed the cache
    cache.write_text("{")
    assert node.content(cache) == digest


def test_a_file_that_has_just_changed_is_not_cached(tmp_path: Path, data: Make) -> None:
    cache = tmp_path / "cache.json"
    jsonl(tmp_path / "a.jsonl", {"text": "one"})
    data("text", path=str(tmp_path / "a.jsonl")).content(cache)
    assert not cache.exists()


def test_memory_stays_flat(tmp_path: Path, data: Make, run: Run) -> None:
    """Forty MB of rows pass through in a few MB."""
    line = json.dumps({"text": "x" * 20_000})
    with (tmp_path / "a.jsonl").open("w") as file:
        for index in range(2000):
            file.write(line.replace("xxx", f"{index:06d}", 1) + "\n")
    node = data("text", path=str(tmp_path / "a.jsonl"))
    tracemalloc.start()
    run(node)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000


def test_text_parts_are_joined_and_an_empty_system_turn_is_none() -> None:
    from lmforge.data.turns import BadRow, chat

    user = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    found = chat([{"role": "system", "content": ""}, user, {"role": "assistant", "content": "c"}], "messages")
    assert found == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(BadRow, match="not text"):
        chat([{"role": "user", "content": [{"type": "image", "image": "x"}]}, {"role": "assistant", "content": "c"}], "messages")
