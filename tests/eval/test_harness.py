"""The real lm-evaluation-harness on a real checkpoint, offline."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from lmforge.codec import decode
from lmforge.errors import CheckpointError, RunError
from lmforge.eval.nodes import Eval
from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.step import Context

lm_eval_utils = pytest.importorskip("lm_eval.utils")
BASE = {
    "type": "lm_eval",
    "after": "last",
    "tasks": ["heldout_code", "heldout_pairs"],
    "num_fewshot": None,
    "limit": None,
    "batch_size": 4,
    "include_path": None,
    "apply_chat_template": False,
}


def run(folder: Path, inputs: dict[str, Path], **change: object) -> dict[str, float]:
    (folder / "metrics").mkdir(parents=True)
    return decode(Eval, BASE | change, "eval").run(Context(step="eval", folder=folder, out=folder / "metrics", inputs=inputs))


def nats(model: torch.nn.Module, context: list[int], answer: list[int]) -> float:
    """-log p(answer | context), one token after the other, seeing at most what the model's context holds."""
    room, ids, total = model.config.max_position_embeddings, context + answer, 0.0
    with torch.no_grad():
        for start in range(len(context), len(ids), room):  # disjoint windows, each given the token before it, as the harness rolls
            end = min(start + room, len(ids))
            window = ids[max(0, end - room - 1) : end]
            logs = model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
            total -= sum(float(logs[len(window) - 1 - (end - place), ids[place]]) for place in range(start, end))
    return total


def test_our_tasks_equal_a_loop_over_the_held_out_data(tmp_path: Path, checkpoint: Path, corpus: Path) -> None:
    level = logging.getLogger("lm_eval").level
    template = lm_eval_utils.env
    got = run(tmp_path, {"checkpoint": checkpoint, "corpus": corpus})
    model, tokenizer = open_model(checkpoint), open_tokenizer(checkpoint)
    texts = [json.loads(line)["text"] for line in (corpus / "text/heldout.jsonl").read_text().splitlines()]
    total = sum(nats(model, [tokenizer.eos_token_id], tokenizer(text)["input_ids"]) for text in texts)
    assert got["heldout_code/bits_per_byte"] == pytest.approx(total / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4)
    assert got["heldout_code/n"] == len(texts) == 12
    right = 0
    for line in (corpus / "preference/heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"].rstrip())["input_ids"]  # the harness moves a prompt's last spaces into the answer
        space = row["prompt"][len(row["prompt"].rstrip()) :]
        whole = [tokenizer(row["prompt"].rstrip() + space + row[side])["input_ids"] for side in ("chosen", "rejected")]
        chosen, rejected = (nats(model, prompt, ids[len(prompt) :]) for ids in whole)
        right += chosen < rejected
    assert got["heldout_pairs/acc"] == right / 12
    assert got["heldout_pairs/acc_stderr"] == pytest.approx(math.sqrt(right / 12 * (1 - right / 12) / 11))
    assert "heldout_pairs/acc_norm" in got
    assert json.loads((tmp_path / "metrics/results.json").read_text())["results"]["heldout_pairs"]["acc,none"] == right / 12
    assert (logging.getLogger("lm_eval").level, lm_eval_utils.env) == (level, template)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harness.log", "metrics"]  # the data set cache is gone


def test_a_folder_of_tasks_and_its_limit(tmp_path: Path, checkpoint: Path, corpus: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    files = f"{{test: {corpus}/text/heldout.jsonl}}"
    plain = f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {files}, cache_dir: {tmp_path}/cache}}\ntest_split: test\n"
    plain += 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    (tasks / "mine.yaml").write_text(plain)
    got = run(tmp_path / "a", {"checkpoint": checkpoint}, tasks=["mine"], include_path=str(tasks), limit=3)
    assert got["mine/n"] == 3
    # A template that reaches for Python stops in the sandbox.
    (tasks / "mine.yaml").write_text(plain.replace("{{text}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(RunError, match="unsafe"):
        run(tmp_path / "b", {"checkpoint": checkpoint}, tasks=["mine"], include_path=str(tasks), limit=3)


def test_refusals_come_before_the_model_is_loaded(tmp_path: Path, corpus: Path) -> None:
    nothing = {"checkpoint": tmp_path / "nowhere"}  # loading it would be a CheckpointError
    with pytest.raises(RunError, match="heldout_pairs needs held-out data"):
        run(tmp_path / "a", nothing, tasks=["heldout_pairs"])
    with pytest.raises(RunError, match="unknown task 'hellaswog'; did you mean 'hellaswag'"):
        run(tmp_path / "b", nothing, tasks=["hellaswog"])
    with pytest.raises(CheckpointError, match=r"no tokenizer|not a model"):
        run(tmp_path / "c", nothing | {"corpus": corpus}, tasks=["heldout_code"])


def test_names_are_checked_before_anything_runs() -> None:
    decode(Eval, BASE, "eval").preflight()
    with pytest.raises(RunError, match="unknown task 'hellaswog'; did you mean 'hellaswag'"):
        decode(Eval, BASE | {"tasks": ["heldout_code", "hellaswog"]}, "eval").preflight()
