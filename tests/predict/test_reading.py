"""Memory of steps that learn nothing, beside the bytes that live while they run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from live_bytes import Live
from tiny_models import FAMILIES

from lmforge.eval.perplexity import choose_rows, perplexity
from lmforge.formats.tokens import Meta, SplitWriter, Tokens, write_meta
from lmforge.inference.rollout import rollout, uniforms
from lmforge.model import build
from lmforge.predict.reading import peak
from lmforge.stage.preference import FeedbackReference, Reference
from lmforge.stage.reference import answer_scores, pair_scores
from lmforge.step import Reading

CPU: Any = SimpleNamespace(accelerator="cpu", name="here")
LENGTH, NEW, ROWS = 128, 96, 8
NAMES = ("llama", "qwen3", "gpt2", "gpt_neox", "mixtral")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokens]:
    """Examples of LENGTH tokens each, all of them supervised."""

    def made(view: str) -> Tokens:
        folder, count = tmp_path_factory.mktemp(view), 32
        draw = torch.Generator().manual_seed(0)
        with SplitWriter(folder, "heldout", 1024, ("labels",) if view == "feedback" else ()) as writer:
            rows = torch.randint(1, 1024, (count, LENGTH), generator=draw).tolist()
            writer.extend(rows, [[1] * LENGTH] * count)
            for index in range(count if view == "feedback" else 0):
                writer.label(index % 2 == 0)
        sizes = {"heldout": count * LENGTH}
        meta: Meta = {
            "view": view, "seq_len": LENGTH, "vocab_size": 1024, "read": {"heldout": count}, "rows": {"heldout": count}, "tokens": sizes,
            "supervised": sizes, "bytes": sizes, "truncated": 0, "dropped": {}, "eos_token_id": 0, "stop_token_ids": [0],
        }  # fmt: skip
        write_meta(folder, meta)
        return Tokens(folder, "heldout")

    return made


def lived(run: Callable[[], Any]) -> int:
    live = Live()
    with live:
        run()
    return live.peak


def near(said: int, found: int) -> None:
    assert -0.02 <= said / found - 1 <= 0.1, (said, found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_perplexity(name: str, dtype: str, tokens: Any) -> None:
    model, there = build.from_scratch(FAMILIES[name], 0).to(getattr(torch, dtype)).eval(), tokens("text")
    found = lived(lambda: perplexity(model, there, choose_rows(there, None), batch_tokens=ROWS * LENGTH, progress=lambda *_: None))
    near(peak(FAMILIES[name], Reading(rows=ROWS, length=LENGTH), dtype, CPU).total, found)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str, tokens: Any) -> None:
    model = build.from_scratch(FAMILIES[name], 0)
    for node, view, scores in ((Reference, "preference", pair_scores), (FeedbackReference, "feedback", answer_scores)):
        there = tokens(view)
        found = lived(lambda there=there, scores=scores: list(scores(model, there)))  # type: ignore[misc]
        near(peak(FAMILIES[name], node(four_bit=None).reads(LENGTH), "bfloat16", CPU).total, found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_answers_drawn(name: str, dtype: str) -> None:
    model = build.from_scratch(FAMILIES[name], 0).to(getattr(torch, dtype)).eval()
    prompts = [[1 + (7 * row + at) % 1000 for at in range(LENGTH)] for row in range(ROWS)]
    noise = torch.cat([uniforms(row, 1, NEW) for row in range(ROWS)])
    found = lived(lambda: rollout(model, prompts, max_new_tokens=NEW, temperature=1.0, stop_ids=[], pad_id=0, noise=noise, top_p=0.9, own_logprobs=True))
    near(peak(FAMILIES[name], Reading(rows=ROWS, length=LENGTH, new=NEW), dtype, CPU).total, found)
