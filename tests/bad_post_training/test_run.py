"""Bad input of post-training that only rows, templates and rewards show: what is bad is set aside and counted, or ends the run in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_post_training.broken import BAD_ROWS, LONG, REFUSALS, TEMPLATES, chat
from tests.conftest import FIXTURES

Cli = Callable[..., Any]


def _rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _good(count: int = 12) -> list[dict[str, Any]]:
    chats = [chat(("user", f"question {number}"), ("assistant", f"answer {number}")) for number in range(count)]
    return chats + [{"prompt": f"ask {number}", "chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(count)]


def _run(cli: Cli, data: Path, stage: str, weights: Path, *more: str) -> Any:
    """A run of some stages on tiny weights, a step each."""
    names = stage.strip("[]").split(",")
    few = [word for name in names if name != "sample" for word in (f"stage.{name}.budget.steps=1", f"stage.{name}.optimizer.global_batch_tokens=256")]
    return cli(f"stage={stage}", f"stage.{names[0]}.init_from={weights}", "data=text", f"data.path={data}", "eval=none", "track=none", *few, *more)


def _artifact(name: str, kind: str) -> Path:
    [step] = [folder for folder in Path("outputs/steps").glob(f"{name}-*") if folder.name.rpartition("-")[0] == name]
    return step / kind


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def test_bad_rows_are_quarantined_and_counted_while_good_rows_go_on(cli: Cli, files: Path, tmp_path: Path) -> None:
    """Rows that are no conversation never reach the tokens; those that the template or the context spoils are counted there."""
    (tmp_path / "rows").mkdir()
    bad = _rows(tmp_path / "rows" / "bad.jsonl", [row for row, _, _ in BAD_ROWS])
    spoiled = [chat(("user", "keep"), ("assistant", "lost</cut>kept")), chat(("user", LONG), ("assistant", "b"))]
    pairs = [{"prompt": "cut", "chosen": "one</cut>same", "rejected": "two</cut>same"}, {"prompt": LONG, "chosen": "b", "rejected": "c"}]
    _rows(tmp_path / "rows" / "good.jsonl", [*_good(), *spoiled, *pairs])
    answer = _run(cli, tmp_path / "rows", "[sft,dpo]", files / "base", "data.heldout_fraction=0.5")
    assert answer.code == 0, answer.err
    account = _json(_artifact("data", "corpus") / "account.json")
    kinds = [kind for _, kind, _ in BAD_ROWS]
    assert account["dropped"] == {kind: kinds.count(kind) for kind in kinds}
    assert (account["in"], account["kept"]) == (len(BAD_ROWS) + 28, 28)
    quarantined = [json.loads(line) for line in (_artifact("data", "corpus") / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"]) for one in quarantined] == [(bad.name, line) for line in range(1, len(BAD_ROWS) + 1)]
    for one, (_, _, reason) in zip(quarantined, BAD_ROWS, strict=True):
        assert reason in one["reason"]
    cut, long = "the chat template changes or drops the text", "the prompt alone fills seq_len"
    spoils = {"tokens.chat": {cut: 1, long: 1}, "tokens.preference": {cut: 1, long: 1}}
    for name, dropped in spoils.items():
        meta = _json(_artifact(name, "tokens") / "meta.json")
        assert meta["dropped"] == dropped
        assert sum(meta["rows"].values()) == 12
        reasons = [json.loads(line) for line in (_artifact(name, "tokens") / "quarantine.jsonl").read_text().splitlines()]
        assert sorted(one["reason"] for one in reasons) == sorted(dropped)
        assert all(re.fullmatch(r"good\.jsonl:\d+", one["source"]) for one in reasons)


def test_where_every_row_is_bad_the_first_is_named(cli: Cli, files: Path, tmp_path: Path) -> None:
    """The fields say which view was meant, so the plan is made; the run ends at the rows, and nothing is trained."""
    chats = [row for row, _, _ in BAD_ROWS if "messages" in row or "conversations" in row]
    pairs, labels = ([row for row, _, _ in BAD_ROWS if field in row] for field in ("chosen", "label"))
    for number, (stage, rows) in enumerate((("sft", chats), ("dpo", pairs), ("kto", labels))):
        for at in range(len(rows)):
            given = [*rows[at:], *rows[:at]]
            file = _rows(tmp_path / f"bad{number}.jsonl", given)
            answer = _run(cli, file, stage, files / "base")
            [reason] = [reason for row, _, reason in BAD_ROWS if row is given[0]]
            assert answer.code == 2
            assert len(answer.err.splitlines()) == 1, answer.err
            assert answer.err.startswith(f"data error: {file.name}:1: {reason}"), answer.err
            assert f"every one of the {len(given)} rows is bad, and this is the first" in answer.err
            assert [
                folder.name for folder in Path("outputs/steps").iterdir() if (folder / "step.json").is_file() and not folder.name.startswith("weights")
            ] == []


def test_rows_without_a_known_field_are_refused_in_the_plan(cli: Cli, tmp_path: Path) -> None:
    for text, what in (('{"a": 1}\n', "no known fields (has: a; wanted"), ("[1]\n", "expected an object, got list"), ("{nope\n", "broken JSON")):
        (tmp_path / "rows.jsonl").write_text(text)
        answer = cli("plan", "stage=[pretrain,sft]", "data=text", f"data.path={tmp_path / 'rows.jsonl'}", "hardware=cpu")
        assert (answer.code, answer.written) == (2, [])
        assert answer.err.startswith(f"data error: rows.jsonl:1: {what}"), answer.err
        assert len(answer.err.splitlines()) == 1


def test_good_rows_behind_many_bad_ones_are_found(cli: Cli, tmp_path: Path) -> None:
    """A plan looks at the first rows alone; what they hold may be bad."""
    _rows(tmp_path / "rows.jsonl", [chat(("user", "a"))] * 40 + _good())
    assert (
        cli(
            "plan",
            "stage=[pretrain,sft]",
            "data=text",
            f"data.path={tmp_path / 'rows.jsonl'}",
            f"stage.pretrain.data.path={FIXTURES / 'corpus'}",
            "hardware=cpu",
        ).code
        == 0
    )


def _first_kept(rows: Path) -> tuple[int, int]:
    """(line, number of the question) of the first training row of the chats."""
    [source] = [json.loads(line)["source"] for line in (_artifact("data", "corpus") / "chat" / "train.jsonl").read_text().splitlines()[:1]]
    line = int(source.partition(":")[2])
    return line, int(json.loads(rows.read_text().splitlines()[line - 1])["messages"][0]["content"].split()[-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_render_ends_the_run_in_one_line(name: str, cli: Cli, files: Path, tmp_path: Path) -> None:
    """The jinja sandbox has limits on time and memory; the weights lie in a folder with such a chat_template."""
    rows = _rows(tmp_path / "good.jsonl", _good())
    answer = _run(cli, rows, "sft", files / name)
    line, question = _first_kept(rows)
    said = REFUSALS[name].format(row=line, question=question, weights=_artifact("weights", "checkpoint"))
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1, answer.err
    assert answer.err.startswith(f"data error: {said}"), answer.err


GRPO = ("stage.grpo.max_new_tokens=8", "stage.grpo.group_size=2", "stage.grpo.eval_prompts=2")
OVERFLOW = ("stage.grpo.reward=sum", *(f"stage.grpo.reward.weights.{name}=1e308" for name in ("parses", "length")), "stage.grpo.reward.rewards.length.target=8")
LINES = {
    "a reward that is NaN": (
        ("stage.grpo.reward=broken",),
        r"run error: reward=broken: is nan for row 0, the answer '.*' to '.*ask \d+.*'; a reward must be a finite",
    ),
    "a sum that overflows": (OVERFLOW, r"run error: reward=sum: is \S+ for row \d, the answer '.*' to '.*'; a reward must be a finite number for every answer"),
    "no reference answers": (
        ("stage.grpo.reward=exact_match",),
        r"data error: reward=exact_match: .*prompt .* has no reference answer; give its row",
    ),
}


@pytest.fixture
def broken_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of options with a reward of a plugin's, which gives NaN; it is unknown again after the test."""
    from lmforge import registry
    from lmforge.reward.nodes import Reward

    registry.load()
    monkeypatch.setattr(registry, "_NODES", {group: dict(options) for group, options in registry._NODES.items()})

    @registry.register("reward", "broken")
    class Broken(Reward):
        """NaN for every answer."""

        def scorer(self, inputs: Any, where: str) -> Any:
            return lambda episodes: [float("nan")] * len(episodes.prompts)

    (tmp_path / "conf" / "reward").mkdir(parents=True)
    (tmp_path / "conf" / "reward" / "broken.yaml").write_text("type: broken\n")
    return tmp_path / "conf"


def test_rewards_that_cannot_be_learned_from_end_the_run(cli: Cli, files: Path, tmp_path: Path, broken_reward: Path) -> None:
    """One line that names the reward, the answer and the prompt; a prompt that leaves no room for an answer is left out and counted before."""
    rows = _rows(tmp_path / "prompts.jsonl", [{"prompt": f"ask {number}"} for number in range(12)] + [{"prompt": LONG + str(number)} for number in range(3)])
    for words, line in LINES.values():
        answer = _run(cli, rows, "grpo", files / "base", *GRPO, *words, "--config-dir", str(broken_reward), "data.heldout_fraction=0.3")
        assert answer.code == 2
        assert len(answer.err.splitlines()) == 1, answer.err
        assert re.match(line, answer.err), answer.err
    meta = _json(_artifact("tokens.prompt", "tokens") / "meta.json")
    assert meta["dropped"] == {"the prompt is longer than seq_len": 3}
    assert sum(meta["rows"].values()) == 12


def test_where_every_prompt_is_longer_than_the_context_the_first_is_named(cli: Cli, files: Path, tmp_path: Path) -> None:
    rows = _rows(tmp_path / "prompts.jsonl", [{"prompt": LONG + str(number)} for number in range(3)])
    answer = _run(cli, rows, "sample", files / "base", "stage.sample.max_new_tokens=8")
    assert answer.code == 2
    assert re.fullmatch(
        r"data error: prompts.jsonl:\d: the prompt is longer than seq_len; every one of the \d .* rows is bad for the prompt view, .*\n", answer.err
    )
