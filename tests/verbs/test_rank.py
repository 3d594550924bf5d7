"""rank: the command line, from a step of samples to rows that the text data source takes."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lmforge.data.nodes import Text
from lmforge.formats import corpus
from lmforge.formats import samples as format_
from lmforge.formats.samples import Answer, Sampled
from lmforge.ranking.ratings import Rating, Ratings
from lmforge.step import Context
from lmforge.tokenizer.markers import SPECIAL_TOKENS, TEMPLATE

Cli = Callable[..., Any]
STEP = "sample-0123456789abcdef"
SAMPLES = [
    Sampled(f"train-{number}", f"def f{number}(x):\n", tuple(Answer(f"    y = x{sign}{number}\n    return y\n", 5, True, -1.0) for sign in ("+", "+-(", "*")))
    for number in range(6)
]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / "steps" / STEP
    (folder / "samples").mkdir(parents=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["def f(x):\n    y = x + 1\n    return y\n"], vocab_size=280, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=SPECIAL_TOKENS[0], additional_special_tokens=list(SPECIAL_TOKENS[1:]))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "samples" / "tokenizer")
    format_.write(folder / "samples", SAMPLES, {"seed": 0})
    (folder / "step.json").write_text("{}")
    run = tmp_path / "out" / "runs" / "20260101-000000-mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"experiment": "mine", "steps": ["sft-ffff0123456789ab", STEP], "metrics": {}}))
    other = tmp_path / "out" / "steps" / "sft-ffff0123456789ab"
    other.mkdir()
    (other / "step.json").write_text("{}")
    return tmp_path / "out"


def rate(output: Path, rater: str, *orders: list[list[int]]) -> None:
    ratings = Ratings(output / "rankings" / STEP / "ratings.jsonl", SAMPLES)
    for sample, order in zip(SAMPLES, orders, strict=False):
        ratings.append(Rating(sample.id, rater, tuple(map(tuple, order)), "ranked"))


def test_by_a_reward_and_back_in_through_the_data_room(cli: Cli, output: Path, tmp_path: Path) -> None:
    answer = cli("rank", "0123", f"output={output}", "--by", "repetition", "--export", "mine/rows.jsonl")
    assert (answer.code, answer.err) == (0, "")
    assert "reward:repetition" in answer.out
    again = cli("rank", "20260101-000000-mine", "--by", "python_parses", "--export", "rows.jsonl", f"--output={output}")
    assert again.code == 0
    assert "6 preference rows" in again.out, again.out
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [sample.prompt for sample in SAMPLES]
    assert all("(" in row["rejected"] and "(" not in row["chosen"] for row in rows)
    assert sorted(path.name for path in (output / "rankings" / STEP).iterdir()) == [
        "preference-reward-python_parses.jsonl",
        "preference-reward-repetition.jsonl",
        "ratings.jsonl",
    ]
    assert (output / "rankings" / STEP / "preference-reward-python_parses.jsonl").read_text() == Path("rows.jsonl").read_text()
    assert sorted(path.name for path in (output / "steps" / STEP).iterdir()) == ["samples", "step.json"]

    data = Text(path="rows.jsonl", text_field="text", heldout_fraction=0.2, txt_document_chars=64)
    assert "preference" in data.views
    (tmp_path / "corpus").mkdir()
    data.run(Context(step="data", folder=tmp_path, out=tmp_path / "corpus", inputs={}))
    kept = [row for split in ("train", "heldout") for row in corpus.read(tmp_path / "corpus", "preference", split)]
    assert sorted(row["chosen"] for row in kept) == sorted(row["chosen"] for row in rows)


def test_keys_of_a_reward_are_typed_as_everywhere_and_name_the_rater(cli: Cli, output: Path) -> None:
    answer = cli("rank", "0123", f"output={output}", "--by", "length", "reward.target=3", "reward.unit=characters")
    assert answer.code == 0
    assert "reward:length target=3 unit=characters: 0 of 6 prompts give a pair" in answer.out
    assert "6 of 6 prompts give a pair" in cli("rank", "0123", f"output={output}", "--by", "length", "reward.target=24", "reward.unit=characters").out
    assert "did you mean 'target'?" in cli("rank", "0123", f"output={output}", "--by", "length", "reward.tarket=3").err
    assert "reward.target" in cli("rank", "0123", f"output={output}", "--by", "length", "reward.target=0").err


def test_by_a_trained_reward_model_and_by_a_judge_of_the_store(cli: Cli, output: Path) -> None:
    """Both are named as steps; random weights, so only who ranked and how often is asked."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 280}
    config = LlamaConfig(max_position_embeddings=1024, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0, num_labels=1, **shape)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "steps" / STEP / "samples" / "tokenizer")
    for step, kind, model in (("reward-aaaa000011112222", "reward_model", LlamaForSequenceClassification), ("dpo-bbbb0000", "checkpoint", LlamaForCausalLM)):
        model(config).save_pretrained(output / "steps" / step / kind)
        tokenizer.save_pretrained(output / "steps" / step / kind)
        (output / "steps" / step / "step.json").write_text("{}")
    answer = cli("rank", "0123", f"output={output}", "--by", "reward_model=aaaa")
    assert answer.code == 0
    assert "reward_model:reward-aaaa000011112222: 6 of 6 prompts give a pair" in answer.out
    assert "6 preference rows of 6 pairs judged" in answer.out
    far = cli("rank", "0123", f"output={output}", "--by", "reward_model=aaaa", "--min-margin", "1000")
    assert "0 of 6 prompts give a pair, 6 without a clear difference" in far.out
    judged = cli("rank", "0123", f"output={output}", "--by", "judge=bbbb")
    assert judged.code == 0
    assert "judge:dpo-bbbb0000: " in judged.out
    assert "reward_model:reward-aaaa000011112222" in cli("rank", "0123", f"output={output}", "--agreement").out


def test_what_was_cut_off_is_left_out_and_the_printed_lines_say_so(cli: Cli, output: Path) -> None:
    """The first prompt's second answer, which is the only one that does not parse, and both others of the second prompt."""
    cut = {("train-0", 1), ("train-1", 0), ("train-1", 2)}
    samples = [replace(one, answers=tuple(replace(had, ended=(one.id, at) not in cut) for at, had in enumerate(one.answers))) for one in SAMPLES]
    format_.write(output / "steps" / STEP / "samples", samples, {"seed": 0})
    answer = cli("rank", "0123", f"output={output}", "--by", "python_parses")
    assert answer.code == 0, answer.err
    assert "4 of 6 prompts give a pair, 1 without a clear difference, 1 without two scores; left out: 3 answers that were cut off" in answer.out
    rate(output, "ann", [[0], [1], [2]], [[0], [1], [2]])
    answer = cli("rank", "0123", f"output={output}", "--export", "rows.jsonl")
    assert "1 preference rows of 6 pairs judged; left out: 5 with an answer that was cut off" in answer.out
    [row] = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert (row["chosen"], row["rejected"]) == (samples[0].answers[0].text, samples[0].answers[2].text)


def test_agreement_and_export_of_chosen_raters(cli: Cli, output: Path) -> None:
    assert "no two raters" in cli("rank", "0123", f"output={output}", "--agreement").out
    assert not (output / "rankings").exists()
    rate(output, "ann", [[0], [1], [2]], [[0], [1], [2]])
    rate(output, "bob", [[0], [2], [1]])
    answer = cli("rank", "0123", f"output={output}", "--agreement")
    assert answer.out == "ann and bob: 67% of 3 pairs (1 prompts) judged alike, Cohen's kappa 0.00\n"
    answer = cli("rank", "0123", f"output={output}", "--export", "all.jsonl")
    assert "5 preference rows of 6 pairs judged; left out: 1 disagreements" in answer.out
    assert "raters: ann, bob" in answer.out
    cli("rank", "0123", f"output={output}", "--export", "bob.jsonl", "--raters", "bob")
    assert len(Path("bob.jsonl").read_text().splitlines()) == 3


REFUSED = {
    "no such run": (("nope",), "no such run, step or digest"),
    "a step without samples": (("ffff",), "made no samples"),
    "unknown method": (("0123", "--by", "lenght"), "did you mean 'length'?"),
    "a method with a value it does not take": (("0123", "--by", "length=3"), "a reward's name stands alone"),
    "a reward model without a name": (("0123", "--by", "reward_model"), "type: --by reward_model=STEP"),
    "the option behind it": (("0123", "--by", "model"), "type: --by reward_model=STEP"),
    "a step without a reward model": (("0123", "--by", "reward_model=ffff"), "made no reward_model"),
    "a judge without a name": (("0123", "--by", "judge"), "type: --by judge=CHECKPOINT"),
    "a judge that is none": (("0123", "--by", "judge=ffff"), "made no checkpoint"),
    "no reference answers": (("0123", "--by", "exact_match"), "has no reference answer"),
    "a rater who said nothing": (("0123", "--export", "x.jsonl", "--raters", "zoe"), "'zoe' has ranked nothing"),
    "raters without a file": (("0123", "--raters", "zoe"), "add --export"),
    "a name with a colon": (("0123", "--rater", "reward:me"), "without a colon"),
    "a margin that is no number": (("0123", "--by", "length", "--min-margin", "nan"), "must be a finite number"),
    "a port": (("0123", "--port", "99999"), "is not a port"),
    "a stray word": (("0123", "more"), "unknown word"),
    "keys without a method": (("0123", "reward.target=3"), "--by"),
    "no run": ((), "type: rank RUN"),
    "an unknown flag": (("0123", "--bye"), "type: rank RUN"),
    "a file that cannot be": (("0123", "--export", "/proc/nowhere/x.jsonl"), "cannot be written"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_one_line(cli: Cli, output: Path, words: tuple[str, ...], said: str) -> None:
    answer = cli("rank", *words, *([f"output={output}"] if words else []))
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert said in answer.err


def test_samples_that_are_damaged_are_named_by_line(cli: Cli, output: Path) -> None:
    file = output / "steps" / STEP / "samples" / "samples.jsonl"
    file.write_text(file.read_text() + "{}\n")
    answer = cli("rank", "0123", f"output={output}", "--agreement")
    assert answer.code == 2
    assert f"{file}:7: is not a sample" in answer.err
    (file.parent / "meta.json").unlink()
    assert "unfinished" in cli("rank", "0123", f"output={output}", "--agreement").err


def test_the_page_as_a_process_saves_every_click_and_ends_by_ctrl_c(output: Path) -> None:
    command = [sys.executable, "-m", "lmforge", "rank", "0123", f"output={output}", "--no-browser", "--rater", "ann"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, page.kill)
    watchdog.start()
    try:
        assert page.stdout is not None
        host, secret = re.fullmatch(r"http://(127\.0\.0\.1:\d+)/([\w-]+)/\n", page.stdout.readline()).groups()  # type: ignore[union-attr]
        connection = http.client.HTTPConnection(host, timeout=10)
        click = {"rater": "ann", "id": "train-0", "places": [[0], [1, 2]], "state": "ranked"}
        connection.request("POST", f"/{secret}/api/rate", json.dumps(click), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["saved"]
        assert json.loads((output / "rankings" / STEP / "ratings.jsonl").read_text())["rater"] == "ann"
        page.send_signal(signal.SIGINT)
        out, err = page.communicate(timeout=90)  # other tests may keep every core busy
    finally:
        watchdog.cancel()
        page.kill()
    assert (page.returncode, err) == (0, "")
    assert "2 preference rows of 3 pairs judged; left out: 1 ties" in out
    assert len((output / "rankings" / STEP / "preference.jsonl").read_text().splitlines()) == 2


def test_planning_a_page_loads_no_torch(output: Path) -> None:
    """A person waits for the page: it opens without torch and transformers."""
    watch = "import sys; from lmforge.__main__ import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", watch, "rank", "0123", f"output={output}", "--agreement"], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 False False"
