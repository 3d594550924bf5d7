from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmforge.codec import decode
from lmforge.errors import CheckpointError, ConfigError
from lmforge.eval.nodes import Eval, NoEval
from lmforge.eval.perplexity import choose_rows, perplexity
from lmforge.formats.tokens import Tokens
from lmforge.inference.checkpoint import open_model
from lmforge.quantize.int8 import quantize_folder
from lmforge.step import Context, Report

BASE = {
    "type": "perplexity",
    "after": "all",
    "batch_tokens": 100,
    "max_tokens": None,
    "max_pairs": None,
    "bigram": True,
    "untrained": True,
    "sample_prompt": None,
    "sample_prompt_tokens": 4,
    "sample_tokens": 8,
    "sample_temperature": 0.0,
}


def silent(done: int, total: int, text: str) -> None:
    assert 0 < done <= total


def plain_losses(model: torch.nn.Module, tokens: Tokens) -> dict[int, list[float]]:
    """Nats of every label by document: each document's pieces one by one, no packing, no mask, labels of the whole document."""
    found: dict[int, list[float]] = {}
    cuts = range(0, len(tokens.ids) + tokens.meta["seq_len"], tokens.meta["seq_len"])  # where a row of the stream begins
    for document in range(len(tokens)):
        start, end = int(tokens.offsets[document]), int(tokens.offsets[document + 1])
        borders = sorted({start, end, *(cut for cut in cuts if start < cut < end)})
        for a, b in itertools.pairwise(borders):
            ids = torch.tensor(tokens.ids[a:b].astype(np.int64))[None]
            with torch.no_grad():
                logs = model(ids).logits[0].double().log_softmax(-1)
            for place in range(a, min(b, end - 1)):
                found.setdefault(document, []).append(-float(logs[place - a, int(tokens.ids[place + 1])]))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_packed_perplexity_is_that_of_a_loop_over_documents(checkpoint: Path, text_tokens: Path, batch_tokens: int) -> None:
    model, tokens = open_model(checkpoint), Tokens(text_tokens, "heldout")
    losses = plain_losses(model, tokens)
    flat = [one for many in losses.values() for one in many]
    mean = sum(flat) / len(flat)
    got = perplexity(model, tokens, choose_rows(tokens, None), batch_tokens=batch_tokens, progress=silent)
    assert got.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert got.nats_per_token == pytest.approx(mean, rel=1e-5)
    assert (got.tokens, got.documents) == (len(flat), len(losses)) == (len(tokens.ids) - len(tokens), 12)
    assert got.bits_per_byte == pytest.approx(mean / math.log(2) * len(tokens.ids) / tokens.meta["bytes"]["heldout"])


def test_standard_error_is_that_of_a_mean_weighted_by_length(checkpoint: Path, text_tokens: Path) -> None:
    model, tokens = open_model(checkpoint), Tokens(text_tokens, "heldout")
    losses = [np.array(many) for many in plain_losses(model, tokens).values()]
    chance = np.random.default_rng(0)
    means = []
    for _ in range(4000):  # the bootstrap over documents, which knows no formula
        drawn = [losses[one] for one in chance.integers(0, len(losses), len(losses))]
        means.append(np.concatenate(drawn).mean())
    got = perplexity(model, tokens, choose_rows(tokens, None), batch_tokens=100, progress=silent)
    assert got.nats_per_token_standard_error == pytest.approx(np.std(means), rel=0.15)
    assert got.perplexity_standard_error == pytest.approx(got.perplexity * got.nats_per_token_standard_error)


def test_max_tokens_reads_rows_spread_over_the_split(text_tokens: Path) -> None:
    tokens = Tokens(text_tokens, "heldout")
    every = choose_rows(tokens, None)
    assert choose_rows(tokens, 10**9) == every
    few = choose_rows(tokens, 3 * 32 + 5)
    assert len(few) == 3
    assert (few[0], few[-1]) == (every[0], every[-1])
    assert len(choose_rows(tokens, 1)) == 1


def test_tokens_that_do_not_fit_the_model_are_refused(checkpoint: Path, text_tokens: Path) -> None:
    model, tokens = open_model(checkpoint), Tokens(text_tokens, "heldout")
    rows = choose_rows(tokens, None)
    model.config.max_position_embeddings = 16
    with pytest.raises(CheckpointError, match="context of 16"):
        perplexity(model, tokens, rows, batch_tokens=100, progress=silent)
    model.resize_token_embeddings(200)
    with pytest.raises(CheckpointError, match="200 token embeddings"):
        perplexity(model, tokens, rows, batch_tokens=100, progress=silent)


class Listener(Report):
    def __init__(self) -> None:
        self.samples: list[str] = []

    def sample(self, title: str, text: str) -> None:
        self.samples.append(text)


def run(tmp_path: Path, inputs: dict[str, Path], report: Report, **change: object) -> dict:
    out = tmp_path / "out"
    out.mkdir(parents=True)
    node = decode(Eval, BASE | change, "eval")
    return node.run(Context(step="eval", folder=tmp_path, out=out, inputs=inputs, report=report))


def test_the_node_reports_what_its_inputs_allow(tmp_path: Path, checkpoint: Path, text_tokens: Path, preference_tokens: Path) -> None:
    both, listener = {"tokens:text": text_tokens, "tokens:preference": preference_tokens}, Listener()
    everything = run(tmp_path / "a", {"checkpoint": checkpoint} | both, listener)
    assert json.loads((tmp_path / "a" / "out" / "metrics.json").read_text()) == everything
    assert listener.samples == [everything["sample"]["prompt"] + everything["sample"]["text"]]
    text = run(tmp_path / "b", {"checkpoint": checkpoint, "tokens:text": text_tokens}, Report(), bigram=False, untrained=False, sample_tokens=0)
    assert set(everything) - set(text) == {"untrained_perplexity", "bigram_perplexity", "bigram_train_tokens", "sample"} | {
        name for name in everything if name.startswith("preference_")
    }
    assert text["perplexity"] == everything["perplexity"]
    pairs = run(tmp_path / "c", {"checkpoint": checkpoint, "tokens:preference": preference_tokens}, Report(), sample_prompt="def", max_pairs=5)
    assert pairs["preference_pairs"] == 5
    assert pairs["sample"]["prompt"] == "def"
    assert "perplexity" not in pairs


def test_answers_are_measured_on_the_supervised_tokens_alone(tmp_path: Path, checkpoint: Path, chat_tokens: Path) -> None:
    got = run(tmp_path, {"checkpoint": checkpoint, "tokens:chat": chat_tokens}, Report(), sample_tokens=0)
    model, heldout = open_model(checkpoint), Tokens(chat_tokens, "heldout")
    nats, counted = 0.0, 0
    for index in range(len(heldout)):
        ids, mask = heldout.example(index)
        with torch.no_grad():
            logs = model(torch.tensor(ids.astype("int64"))[None, :-1]).logits[0].double().log_softmax(-1)
        for place in range(1, len(ids)):
            if mask[place]:
                nats, counted = nats - float(logs[place - 1, int(ids[place])]), counted + 1
    assert got["answer_tokens"] == counted
    assert got["answer_perplexity"] == pytest.approx(math.exp(nats / counted), rel=1e-5)


def test_a_quantized_checkpoint_is_measured_like_any_other(tmp_path: Path, checkpoint: Path, text_tokens: Path) -> None:
    small = tmp_path / "int8"
    small.mkdir()
    quantize_folder(checkpoint, small, embeddings=True, skip=(), group_size=None, progress=silent)
    got = run(tmp_path / "eval", {"checkpoint": small, "tokens:text": text_tokens}, Report())
    plain = run(tmp_path / "plain", {"checkpoint": checkpoint, "tokens:text": text_tokens}, Report())
    assert got["perplexity"] == pytest.approx(plain["perplexity"], rel=0.1)
    assert got["perplexity"] != plain["perplexity"]
    assert got["untrained_perplexity"] == plain["untrained_perplexity"]


def test_an_untrained_model_is_near_uniform_and_the_same_each_time(tmp_path: Path, checkpoint: Path, text_tokens: Path) -> None:
    model = open_model(checkpoint)
    model.config.initializer_range = 0.02
    model.save_pretrained(tmp_path / "small")
    inputs = {"checkpoint": tmp_path / "small", "tokens:text": text_tokens}
    first, second = (run(tmp_path / name, inputs, Report(), sample_tokens=0)["untrained_perplexity"] for name in ("a", "b"))
    assert first == second == pytest.approx(300, rel=0.1)  # the vocabulary's size


def test_which_checkpoints_are_measured_and_what_is_refused() -> None:
    every, last, none = decode(Eval, BASE), decode(Eval, BASE | {"after": "last"}), decode(Eval, {"type": "none"})
    assert [node.measures(last=False) for node in (every, last, none)] == [True, False, False]
    assert [node.measures(last=True) for node in (every, last, none)] == [True, True, False]
    assert NoEval.produces == ""
    for change, where in (({"after": "first"}, "after"), ({"batch_tokens": 0}, "batch_tokens"), ({"max_pairs": -1}, "max_pairs")):
        with pytest.raises(ConfigError, match=where):
            decode(Eval, BASE | change, "eval")


def test_under_a_soft_prompt_every_document_reads_it(checkpoint: Path, text_tokens: Path, tmp_path: Path) -> None:
    """The oracle: the prompt and one piece of a document at a time, embedded side by side; packed rows would leave the prompt to the first."""
    from lmforge.inference.merge import merge_folders
    from lmforge.model import build
    from tests.adapter import tiny

    node = tiny.adapter("prompt_tuning", virtual_tokens=5)
    node.save(tiny.learn(node.attach(build.from_folder(checkpoint).eval())), checkpoint, tmp_path / "adapter", checkpoint)
    merge_folders(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    model, tokens = open_model(tmp_path / "merged"), Tokens(text_tokens, "heldout")
    base, prompt = model.get_base_model(), model.get_prompt(batch_size=1)

    class Prompted(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> SimpleNamespace:
            found = base(inputs_embeds=torch.cat([prompt, base.get_input_embeddings()(ids)], 1)).logits
            return SimpleNamespace(logits=found[:, 5:])

    flat = [one for many in plain_losses(Prompted(), tokens).values() for one in many]
    for batch_tokens in (1, 100, 10_000):
        found = perplexity(model, tokens, choose_rows(tokens, None), batch_tokens=batch_tokens, progress=silent)
        assert found.tokens == len(flat)
        assert found.nats_per_token == pytest.approx(np.mean(flat), rel=1e-5)
    assert abs(perplexity(open_model(checkpoint), tokens, choose_rows(tokens, None), batch_tokens=100, progress=silent).nats_per_token - np.mean(flat)) > 0.01


def test_a_document_that_does_not_fit_beside_a_prompt_goes_on_in_another_row(checkpoint: Path, text_tokens: Path, tmp_path: Path) -> None:
    from lmforge.eval.perplexity import _rows_for
    from lmforge.model import build
    from tests.adapter import tiny

    attached = tiny.adapter("prompt_tuning", virtual_tokens=108).attach(build.from_folder(checkpoint).eval())  # of a context of 128
    tokens = Tokens(text_tokens, "heldout")
    rows = choose_rows(tokens, None)
    found, width = _rows_for(attached, rows, tokens)
    assert width == 20
    assert all(len(row) == 1 and 0 < row[0][1] - row[0][0] <= 20 for row in found)
    assert [place for row in found for start, end in row for place in range(start, end)] == list(range(len(tokens.ids)))
    assert (
        perplexity(attached, tokens, rows, batch_tokens=100, progress=silent).tokens
        == perplexity(open_model(checkpoint), tokens, rows, batch_tokens=100, progress=silent).tokens
    )
