"""`data=mixture`: proportions in bytes, epochs, interleaving, and nothing held out that is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.data.nodes import Data, Text
from lmforge.errors import ConfigError
from lmforge.formats import corpus

Make, Run = Callable[..., Data], Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, data: Make, plain: Callable[..., dict[str, Any]]) -> Callable[..., Data]:
    """A mixture of `big` (1000 rows, 20,000 bytes) and `small` (100 rows of twice the bytes), by weights."""

    def go(weights: dict[str, float], max_epochs: float = 1.0, extra: str = "") -> Data:
        (tmp_path / "big.jsonl").write_text("".join(json.dumps({"text": f"big {index:016d}"}) + "\n" for index in range(1000)))
        (tmp_path / "small.jsonl").write_text("".join(json.dumps({"text": f"small {index:034d}"}) + "\n" for index in range(100)) + extra)
        sources = {name: plain("text", path=str(tmp_path / f"{name}.jsonl")) for name in ("small", "big")}
        return data("mixture", sources=sources, weights=weights, max_epochs=max_epochs)

    return go


def bytes_of(texts: list[str], name: str) -> int:
    return sum(len(text) for text in texts if text.startswith(name))


def train(out: Path) -> list[str]:
    return [row["text"] for row in corpus.read(out, "text", "train")]


@pytest.mark.parametrize(("weights", "share"), [({"small": 1, "big": 1}, 0.5), ({"small": 1, "big": 3}, 0.25), ({"small": 0.02, "big": 0.98}, 0.02)])
def test_weights_are_shares_of_the_training_bytes(weights: dict[str, float], share: float, make: Callable[..., Data], run: Run) -> None:
    texts = train(run(make(weights)))
    small, total = bytes_of(texts, "small"), bytes_of(texts, "")
    assert small / total == pytest.approx(share, abs=40 / total)
    assert len(set(texts)) == len(texts)  # max_epochs 1: nothing twice


def test_the_scarcest_source_is_read_max_epochs_times(make: Callable[..., Data], run: Run) -> None:
    out = run(make({"small": 1, "big": 1}, max_epochs=2.5))
    texts = train(out)
    account = corpus.account(out)
    report = {name: account.more["sources"][name]["views"]["text"] for name in ("small", "big")}
    rows = sum(text.startswith("small") for text in texts)
    small = len({text for text in texts if text.startswith("small")})
    assert rows == pytest.approx(2.5 * small, abs=1)
    assert report["small"]["epochs"] == pytest.approx(2.5, abs=0.01)
    assert report["big"]["epochs"] == pytest.approx(2.5 * small * 40 / report["big"]["bytes"], rel=0.01)
    assert account.views["text"].repeated == rows - small
    counts = [texts.count(text) for text in {text for text in texts if text.startswith("small")}]
    assert set(counts) == {2, 3}


def test_the_proportions_hold_in_every_stretch(make: Callable[..., Data], run: Run) -> None:
    texts = train(run(make({"small": 1, "big": 3}, max_epochs=2)))
    for end in range(20, len(texts), 20):
        stretch = texts[:end]
        assert abs(bytes_of(stretch, "small") - 0.25 * bytes_of(stretch, "")) <= 40


def test_held_out_rows_are_taken_once_and_never_trained_on(make: Callable[..., Data], run: Run, tmp_path: Path) -> None:
    alone = run(make({"small": 1, "big": 1}), "probe")
    held = [row["text"] for row in corpus.read(alone, "text", "heldout") if row["text"].startswith("big")]
    leak = "".join(json.dumps({"text": text, "note": 1}) + "\n" for text in held)
    assert len(held) > 20
    out = run(make({"small": 1, "big": 1}, extra=leak))
    heldout = [row["text"] for row in corpus.read(out, "text", "heldout")]
    assert len(set(heldout)) == len(heldout)
    assert not set(heldout) & set(train(out))
    account = corpus.account(out)
    assert account.views["text"].dropped["held_out_by_a_source"] + account.views["text"].dropped["duplicate"] == len(held)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["corpus", "probe"]


def test_the_account_carries_each_source_and_its_quarantine(make: Callable[..., Data], run: Run) -> None:
    out = run(make({"small": 1, "big": 1}, extra="{\n"))
    account = corpus.account(out)
    assert account.more["sources"]["small"]["account"]["dropped"] == {"broken_json": 1}
    assert next(iter(corpus.quarantined(out)))["file"] == "small/small.jsonl"
    assert account.rows.entered == 1100
    assert {row["source"].partition("/")[0] for row in corpus.read(out, "text", "train")} == {"small", "big"}


def test_two_runs_are_the_same(make: Callable[..., Data], run: Run) -> None:
    a, b = run(make({"small": 1, "big": 1}), "a"), run(make({"big": 5, "small": 5}), "b")
    assert (a / "text" / "train.jsonl").read_bytes() == (b / "text" / "train.jsonl").read_bytes()


def test_views_are_those_of_any_source_and_weights_count_within_one(tmp_path: Path, data: Make, plain: Callable[..., dict[str, Any]], run: Run) -> None:
    for name, row in {"words": {"text": "Words {0}."}, "chats": {"prompt": "Q{0}", "completion": "A"}}.items():
        lines = [json.dumps(row).replace("{0}", str(index)) for index in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = {name: plain("text", path=str(tmp_path / f"{name}.jsonl")) for name in ("words", "chats")}
    node = data("mixture", sources=sources, weights={"words": 9, "chats": 1})
    assert node.views == ("text", "chat")
    account = corpus.account(run(node))
    assert [tally.kept for tally in account.views.values()] == [50, 50]  # each is alone in its view, so all of it is read once


def test_content_follows_its_sources(make: Callable[..., Data]) -> None:
    first = make({"small": 1, "big": 1}).content(None)
    assert make({"small": 1, "big": 1}).content(None) == first
    assert make({"small": 1, "big": 1}, extra='{"text": "more"}\n').content(None) != first


def test_bad_mixtures(tmp_path: Path, data: Make, plain: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError) as caught:
        data("mixture", sources={"a": plain("pystdlib")}, weights={"a": 0, "b": 1})
    assert str(caught.value).splitlines() == [
        "conf error: data.sources: 1 given; a mixture needs at least two; for one, choose it with data=",
        "conf error: data.weights.b: each source has one weight, and each weight a source; sources has: a",
        "conf error: data.weights.a: 0 must be > 0; leave the source out instead",
    ]
    with pytest.raises(ConfigError, match=r"data.sources.own.path: must be set"):
        data("mixture", sources={"code": plain("pystdlib"), "own": plain("text")})


def test_the_yaml_composes_from_other_options(tmp_path: Path) -> None:
    """Hydra puts each named option under its source's name, so that no value is written twice."""
    from hydra import compose, initialize_config_dir

    (tmp_path / "config.yaml").write_text("defaults: [_self_, {data: mixture}]\n")
    (tmp_path / "data").symlink_to(Path(__file__).parents[2] / "conf" / "data")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("config", overrides=["data.sources.own.path=x", "data.weights.own=2"])
    assert (config.data.sources.code.type, config.data.sources.own.path, config.data.weights.own) == ("pystdlib", "x", 2)


@pytest.mark.parametrize("view", ["chat", "preference", "feedback", "prompt"])
def test_a_prompt_that_one_source_holds_out_is_trained_on_from_none(
    view: str, tmp_path: Path, data: Make, plain: Callable[..., dict[str, Any]], run: Run
) -> None:
    """The same prompts with other answers in two sources that hold out different shares."""
    sources = {}
    for name, fraction in {"a": 0.5, "b": 0.1}.items():
        answers = {
            "chat": {"completion": f"{name} says"},
            "preference": {"chosen": f"{name} yes", "rejected": f"{name} no"},
            "feedback": {"completion": f"{name} says", "label": True},
            "prompt": {"answer": name},
        }[view]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"Q{index}"} | answers) + "\n" for index in range(60)))
        sources[name] = plain("text", path=str(tmp_path / f"{name}.jsonl"), heldout_fraction=fraction)
    out = run(data("mixture", sources=sources, weights={"a": 1, "b": 1}, max_epochs=1.0))
    prompts = {split: {row["messages"][0]["content"] if view == "chat" else row["prompt"] for row in corpus.read(out, view, split)} for split in corpus.SPLITS}
    assert len(prompts["heldout"]) > 20
    assert not prompts["heldout"] & prompts["train"]
    assert corpus.account(out).views[view].dropped["held_out_by_a_source"] > 10


def test_content_follows_the_code_of_its_sources(make: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    before = make({"small": 1, "big": 1}).content(None)
    monkeypatch.setattr(Text, "code_revision", Text.code_revision + 1)
    assert make({"small": 1, "big": 1}).content(None) != before
