"""A sweep of DPO over three betas, beside TRL's DPOTrainer: the same Llama, pairs, precision, batch and steps, in turn in one process.

Ours is the reference pass once (the step that a plan shares between sweep points) and three trainings; TRL's is three trainers, in the faster of its
two ways with the reference. Model loading and tokenization are not timed for either. TRL's log-probs are compared with ours on the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from lmforge.formats.tokens import Meta, SplitWriter, Tokens, write_meta
from lmforge.model import build
from lmforge.optimizer.nodes import AdamW
from lmforge.optimizer.schedule import Constant
from lmforge.parallel.nodes import Single
from lmforge.stage.reference import reference
from lmforge.step import Context, Placement, Report
from lmforge.training.fit import fit
from lmforge.training.losses.preference import dpo
from lmforge.training.objectives.preference import PairRows, Preference, pair_logprobs
from lmforge.training.recipe import Recipe

PROMPT, RESPONSE, VOCABULARY, EOS = 512, 128, 2048, 0
BETAS, LEARNING_RATE, PAIRS_PER_STEP = (0.05, 0.1, 0.5), 1e-4, 4
CONFIG = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": None,
}  # fmt: skip


def random_pairs(count: int) -> list[dict[str, list[int]]]:
    """Random pairs: what is in them costs the same as text."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, size=(count, PROMPT + 2 * (RESPONSE - 1))).tolist()
    cut = PROMPT + RESPONSE - 1
    return [{"prompt_ids": one[:PROMPT], "chosen_ids": [*one[PROMPT:cut], EOS], "rejected_ids": [*one[cut:], EOS]} for one in ids]


def write_tokens(folder: Path, pairs: list[dict[str, list[int]]]) -> Path:
    """The pairs as our tokens; nothing is held out."""
    counts = {}
    for split, some in (("train", pairs), ("heldout", [])):
        with SplitWriter(folder, split, VOCABULARY) as writer:
            both = [(one["prompt_ids"], one[name]) for one in some for name in ("chosen_ids", "rejected_ids")]
            writer.extend([a + b for a, b in both], [[0] * len(a) + [1] * len(b) for a, b in both])
        counts[split] = writer.tokens
    write_meta(
        folder,
        Meta(
            view="preference", seq_len=PROMPT + RESPONSE, vocab_size=VOCABULARY, read={}, rows={}, tokens=counts, supervised={}, bytes={}, truncated=0,
            dropped={}, eos_token_id=EOS, stop_token_ids=[EOS],
        ),
    )  # fmt: skip
    return folder


def context(folder: Path, out: str, **inputs: Path) -> Context:
    made = folder / out
    made.mkdir(parents=True, exist_ok=True)
    placement = Placement(devices=1, mesh={}, micro_batch_size=PAIRS_PER_STEP, accumulation=1)
    named = {name.replace("_", ":"): path for name, path in inputs.items()}
    return Context(step="dpo", folder=made, out=made, inputs=named, placement=placement, report=Report())


def ours(home: Path, steps: int) -> float:
    """Seconds of the reference pass and of a training for each beta."""
    optimizer = AdamW(
        lr=LEARNING_RATE, weight_decay=0.0, grad_clip=1.0, global_batch_tokens=2 * PAIRS_PER_STEP * (PROMPT + RESPONSE), beta1=0.9, beta2=0.999, eps=1e-8,
        schedule=Constant(warmup=0.0), skip_sigma=None, skip_window=128, max_skips=0,
    )  # fmt: skip
    recipe = Recipe(
        steps=steps, rows_per_step=PAIRS_PER_STEP, seq_len=PROMPT + RESPONSE, seed=0, optimizer=optimizer, param_dtype="float32", compute_dtype="float32",
        reduce_dtype="float32", buffer_dtype="float32", loss_scale=None, log_every=steps, save_every_s=1e9, parallel=Single(
            micro_batch_size=PAIRS_PER_STEP, activation_checkpointing="none", compile=False, data_workers=0, max_restarts=0, grace_s=60.0,
        ),
    )  # fmt: skip
    models = [build.from_folder(home / "model") for _ in BETAS]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        made = context(Path(folder), "reference", checkpoint=home / "model", tokens_preference=home / "tokens")
        reference(made)
        for beta, model in zip(BETAS, models, strict=True):
            loss = partial(dpo, beta=beta, label_smoothing=0.0, length_normalized=False)
            fit(recipe, Preference(home / "tokens", made.out, loss), model, context(Path(folder), f"dpo-{beta}"), lambda trained: None)
        return time.perf_counter() - started


class Prepared(DPOTrainer):
    """TRL's trainer on pairs that are tokenized already."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset


def trl_trainer(home: Path, folder: Path, model: Any, data: Dataset, beta: float, precompute: bool, steps: int) -> DPOTrainer:
    options = DPOConfig(
        output_dir=str(folder), beta=beta, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", per_device_train_batch_size=PAIRS_PER_STEP,
        precompute_ref_log_probs=precompute, precompute_ref_batch_size=16, max_steps=steps, max_length=None, gradient_checkpointing=False, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", logging_steps=steps, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    return Prepared(model, None, options, train_dataset=data, processing_class=PreTrainedTokenizerFast.from_pretrained(home / "words"))


def theirs(home: Path, data: Dataset, steps: int, precompute: bool) -> float:
    """Seconds of a trainer for each beta. With `precompute` TRL keeps the log-probs of the first trainer for the others, as it does by itself."""
    models = [build.from_folder(home / "model") for _ in BETAS]
    with tempfile.TemporaryDirectory() as folder, quiet():
        data.save_to_disk(f"{folder}/data")  # a fresh copy: what an earlier round kept is not found
        fresh = Dataset.load_from_disk(f"{folder}/data")
        started = time.perf_counter()
        for beta, model in zip(BETAS, models, strict=True):
            trl_trainer(home, Path(folder), model, fresh, beta, precompute, steps).train()
        return time.perf_counter() - started


def difference(home: Path, data: Dataset) -> float:
    """The largest difference between TRL's log-probs and ours, on the same weights and its own batch."""
    model = build.from_folder(home / "model").eval()
    rows = PairRows(Tokens(home / "tokens", "train"))
    count = min(8, len(rows))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, quiet():
        logps, _ = pair_logprobs(model, rows.batch(range(count)))
        trainer = trl_trainer(home, Path(folder), build.from_folder(home / "model"), data, BETAS[0], False, 1)
        found = trainer.compute_ref_log_probs(trainer.model.eval(), trainer.data_collator([data[index] for index in range(count)]))
    return float((logps - torch.stack(found, 1)).abs().max())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without TRL's lines and bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def write_home(home: Path, count: int) -> Dataset:
    """A model of random weights, TRL's tokenizer, our tokens; TRL's rows are returned."""
    model = build.from_scratch(CONFIG, 0)
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(home / "model")
    words = Tokenizer(WordLevel({"<eos>": EOS, **{f"w{index}": index for index in range(1, VOCABULARY)}}, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(home / "words")
    pairs = random_pairs(count)
    write_tokens(home / "tokens", pairs)
    return Dataset.from_list(pairs)


def measure(home: Path, rounds: int, steps: int) -> dict[str, Any]:
    """All three in turn, in an order that is turned around each round; the first, short round warms up and does not count."""
    data = write_home(home, PAIRS_PER_STEP * steps)
    ways = {"lmforge": partial(ours, home), "trl, cached": partial(theirs, home, data, precompute=True), "trl": partial(theirs, home, data, precompute=False)}
    for way in ways.values():
        way(steps=1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways)[:: 1 if index % 2 else -1]:
            seconds[name].append(ways[name](steps=steps))
    best = min(("trl", "trl, cached"), key=lambda name: float(np.median(seconds[name])))
    ratios = [b / a for a, b in zip(seconds["lmforge"], seconds[best], strict=True)]
    trained = len(BETAS) * steps * PAIRS_PER_STEP
    return {
        "seconds": {name: [round(one, 2) for one in values] for name, values in seconds.items()},
        "pairs_per_s": {name: round(trained / float(np.median(values)), 2) for name, values in seconds.items()},
        "trl's faster way": best,
        "ratios": [round(one, 2) for one in ratios],
        "ratio": round(float(np.median(ratios)), 2),
        "largest_logprob_difference": difference(home, data),
        "pairs": PAIRS_PER_STEP * steps, "steps": steps, "betas": BETAS, "prompt_tokens": PROMPT, "response_tokens": RESPONSE,
        "parameters": build.from_scratch(CONFIG, 0).num_parameters(), "threads": torch.get_num_threads(), "trl_version": version("trl"),
        "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    """Print the result and keep it in benchmarks/results."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=4)
    words.add_argument("--steps", type=int, default=8, help="optimizer steps of each training")
    asked = words.parse_args()
    disable_progress_bars()
    disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as home:
        found = measure(Path(home), asked.rounds, asked.steps)
    text = json.dumps(found, indent=1)
    (Path(__file__).parent / "results" / "dpo_vs_trl.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
