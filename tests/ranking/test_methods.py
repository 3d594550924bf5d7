"""Rewards, a reward model and a judge as raters, on real models of a few thousand parameters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lmforge.errors import CheckpointError
from lmforge.formats.samples import Sampled
from lmforge.ranking import judge as judge_
from lmforge.ranking import machine, pairs
from lmforge.ranking.judge import Judge
from lmforge.ranking.machine import Scores, extremes
from lmforge.ranking.ratings import Ratings
from lmforge.reward.nodes import Episodes, Length, PythonParses, RewardModel
from lmforge.tokenizer.markers import SPECIAL_TOKENS, TEMPLATE

from .conftest import SAMPLES, halted, sampled

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
FIT = [*SAMPLES[:2]]


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([judge_.QUESTION, "def add(a, b):\n    return a + b\n"], vocab_size=320, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=SPECIAL_TOKENS[0], additional_special_tokens=list(SPECIAL_TOKENS[1:]))
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def model_in(folder: Path, tokenizer: Path, kind: Any, **more: Any) -> Path:
    torch.manual_seed(0)
    kind(LlamaConfig(vocab_size=330, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0, **SHAPE, **more)).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_the_best_is_put_above_the_worst() -> None:
    assert extremes(Scores((0.1, 3.0, -2.0, 1.0)), 0) == ((1,), (2,))
    assert extremes(Scores((0.1, None, -2.0)), 0) == ((0,), (2,))
    assert extremes(Scores((0.1, 0.4)), 0.5) == ((0, 1),)
    assert extremes(Scores((0.1, 0.6)), 0.5) == ((1,), (0,))
    assert extremes(Scores((1.0, 0.0), frozenset({(0, 1)})), 0) == ((0, 1),)
    assert extremes(Scores((1.0, 1.0, 1.0)), 0) == ((0, 1, 2),)
    assert extremes(Scores((None, 1.0)), 0) == ()


def test_a_method_rates_under_its_name_and_says_nothing_twice(ratings: Ratings) -> None:
    scores = [Scores((0.5, 0.0, 1.0)), Scores((1.0, 1.0, 1.0)), Scores((None, None))]
    account = machine.rank(SAMPLES[:3], scores, ratings, "reward:x", 0.0)
    assert (account.prompts, account.pairs, account.ties, account.unscored) == (3, 1, 1, 1)
    assert str(account) == "1 of 3 prompts give a pair, 1 without a clear difference, 1 without two scores"
    written = ratings.file.read_text()
    assert json.loads(written.splitlines()[0])["scores"] == [0.5, 0.0, 1.0]
    assert machine.rank(SAMPLES[:3], scores, Ratings(ratings.file, SAMPLES), "reward:x", 0.0) == account
    assert ratings.file.read_text() == written
    [row] = pairs.preferences(SAMPLES, ratings, ["reward:x"]).rows
    assert (row["chosen"], row["rejected"]) == (SAMPLES[0].answers[2].text, SAMPLES[0].answers[1].text)


def test_a_verifiable_reward_prefers_the_answer_that_parses(tokenizer: Path) -> None:
    samples = [sampled("a", "def f(x):", "    return x +\n", "    return x + 1\n"), sampled("b", "def g():", "    return 2\n", "    ((\n", "    return 1\n")]
    scorer = PythonParses(min_nodes=1, max_chars=100, trimmed=False).open({})
    found = machine.by_reward(samples, scorer, tokenizer, quiet)
    assert [one.values for one in found] == [(0.0, 1.0), (1.0, 0.0, 1.0)]
    assert extremes(found[0], 0) == ((1,), (0,))


def test_a_reward_is_given_what_the_policy_wrote(tokenizer: Path) -> None:
    """Ids of prompt and answer up to the end token, where the answer starts, the reference; an answer with a special token in it has no score."""
    seen: list[Episodes] = []

    def scorer(episodes: Episodes) -> list[float]:
        seen.append(episodes)
        return [float(len(answer)) for answer in episodes.answers]

    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    samples = [SAMPLES[0], sampled("x", turns, "dd", "<|end|>e")]
    found = machine.by_reward(samples, scorer, tokenizer, quiet)
    assert found[0].values == tuple(float(len(answer.text)) for answer in SAMPLES[0].answers)
    assert found[1].values == (2.0, None)
    opened = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    [episodes] = seen
    assert episodes.references == ["    return a + b\n"] * 3 + [None]
    assert opened.decode(episodes.ids[0]) == "<|user|>def add(a, b):<|end|><|assistant|>    return a + b\n<|end|>"
    assert opened.decode(episodes.ids[0][episodes.starts[0] :]) == "    return a + b\n<|end|>"
    assert opened.decode(episodes.ids[3]) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>dd<|end|>"
    assert episodes.prompts[3] == "abc"
    length = machine.by_reward(samples[:1], Length(target=1, unit="tokens").open({}), tokenizer, quiet)
    assert all(0 <= value <= 1 for value in length[0].values if value is not None)


def test_a_cut_answer_is_neither_scored_nor_compared_and_is_counted(tokenizer: Path, tmp_path: Path, ratings: Ratings) -> None:
    """Its ids would hold an end token that it never had. The others are scored as if it were not there."""
    cut = [halted(SAMPLES[0], 1), SAMPLES[1], halted(SAMPLES[2], 0)]
    whole = [replace(SAMPLES[0], answers=(SAMPLES[0].answers[0], SAMPLES[0].answers[2]))]
    seen: list[str] = []

    def scorer(episodes: Episodes) -> list[float]:
        seen.extend(episodes.answers)
        return [float(len(answer)) for answer in episodes.answers]

    found = machine.by_reward(cut, scorer, tokenizer, quiet)
    assert cut[0].answers[1].text not in seen
    assert cut[2].answers[0].text not in seen
    assert len(seen) == 6
    assert [tuple(value is None for value in one.values) for one in found] == [(False, True, False), (False,) * 3, (True, False)]
    judge = Judge(model_in(tmp_path / "judge", tokenizer, LlamaForCausalLM))
    [judged, apart] = [judge.scores(one, quiet)[0] for one in (cut[:1], whole)]
    assert judged.values[1] is None
    assert (judged.values[0], judged.values[2]) == apart.values
    account = machine.rank(cut, found, ratings, "reward:x", 0.0)
    assert (account.prompts, account.pairs, account.unscored, account.cut) == (3, 2, 1, 2)
    assert str(account) == "2 of 3 prompts give a pair, 1 without two scores; left out: 2 answers that were cut off"


def test_a_reward_model_scores_at_the_end_token(tokenizer: Path, tmp_path: Path) -> None:
    folder = model_in(tmp_path / "reward_model", tokenizer, LlamaForSequenceClassification, num_labels=1)
    scorer = RewardModel(batch_size=2, shift=0.0, scale=1.0).open({"reward_model": folder})
    found = machine.by_reward(FIT, scorer, folder, quiet)
    opened, model = PreTrainedTokenizerFast.from_pretrained(folder), LlamaForSequenceClassification.from_pretrained(folder).eval()
    for sample, scores in zip(FIT, found, strict=True):
        for answer, score in zip(sample.answers, scores.values, strict=True):
            text = f"<|user|>{sample.prompt}<|end|><|assistant|>{answer.text}<|end|>"
            with torch.no_grad():
                expected = model(torch.tensor([opened(text, add_special_tokens=False)["input_ids"]])).logits.item()
            assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("chat", [True, False])
def test_the_judge_reads_both_orders(tokenizer: Path, tmp_path: Path, chat: bool) -> None:
    """Against the same question rendered by hand and one plain forward pass for each order."""
    folder = model_in(tmp_path / "judge", tokenizer, LlamaForCausalLM)
    if not chat:
        (folder / "chat_template.jinja").unlink()
    opened, model = PreTrainedTokenizerFast.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    assert bool(opened.chat_template) == chat

    def odds(sample: Sampled, first: int, second: int) -> float:
        text = judge_.QUESTION.format(prompt=sample.prompt, first=sample.answers[first].text, second=sample.answers[second].text)
        text = f"<|user|>{text}<|end|><|assistant|>" if chat else f"{text}\n\nThe better answer is"
        space = "" if chat else " "
        both = [opened(f"{text}{space}{letter}", add_special_tokens=False)["input_ids"] for letter in "AB"]
        shared = next(at for at, (a, b) in enumerate(zip(*both, strict=True)) if a != b)
        with torch.no_grad():
            logprobs = model(torch.tensor([both[0][:shared]])).logits[0, -1].log_softmax(-1)
        return (logprobs[both[0][shared]] - logprobs[both[1][shared]]).item()

    for sample, found in zip(FIT, Judge(folder).scores(FIT, quiet), strict=True):
        count = len(sample.answers)
        lead = {(one, two): odds(sample, one, two) for one in range(count) for two in range(count) if one != two}
        for one in range(count):
            expected = sum((lead[one, two] - lead[two, one]) / 2 for two in range(count) if two != one) / (count - 1)
            assert found.values[one] == pytest.approx(expected, abs=1e-4)
        assert found.doubtful == {(one, two) for one in range(count) for two in range(one + 1, count) if lead[one, two] * -lead[two, one] <= 0}
        assert math.isclose(sum(value or 0 for value in found.values), 0, abs_tol=1e-4)


def test_a_judge_without_room_gives_no_scores_and_one_without_weights_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    folder = model_in(tmp_path / "judge", tokenizer, LlamaForCausalLM)
    [found] = Judge(folder).scores([sampled("long", "x " * 600, "a", "b")], quiet)
    assert found.values == (None, None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Judge(folder)
