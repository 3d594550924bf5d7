"""Tiny models, tokens and runs for the tests here; as a script it is what their subprocesses run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lmforge.formats.tokens import Meta, SplitWriter, write_meta
from lmforge.optimizer.nodes import AdamW, Optimizer
from lmforge.optimizer.schedule import Cosine
from lmforge.parallel.nodes import DDP, Parallel, Single
from lmforge.step import Context, Placement, Report
from lmforge.training.recipe import Recipe

VOCABULARY, EOS = 61, 0
UNGUARDED: dict[str, Any] = {"skip_sigma": None, "skip_window": 128, "max_skips": 0}


def write_tokens(folder: Path, view: str, examples: int = 60, seq_len: int = 16, seed: int = 0) -> Path:
    """Random examples of uneven lengths; in other views than text a prompt of uneven length is unsupervised, the same in both examples of a pair."""
    generator = np.random.default_rng(seed)
    for split in ("train", "heldout"):
        lengths = generator.integers(4, seq_len, size=examples)
        ids = [[*generator.integers(1, VOCABULARY, size=length).tolist(), EOS] for length in lengths]
        prompts = [0 if view == "text" else int(generator.integers(1, length)) for length in lengths]
        if view == "preference":
            for a, b in zip(range(0, examples, 2), range(1, examples, 2), strict=True):
                prompts[b] = prompts[a] = min(prompts[a], len(ids[b]) - 1)
                ids[b][: prompts[b]] = ids[a][: prompts[a]]
        masks = [[0] * prompt + [1] * (len(one) - prompt) for one, prompt in zip(ids, prompts, strict=True)]
        write_split(folder, split, view, ids, masks, labels=[index % 3 != 0 for index in range(examples)], seq_len=seq_len)
    return folder


def write_split(
    folder: Path, split: str, view: str, ids: list[list[int]], masks: list[list[int]], *, labels: list[bool] | None = None, margins: list[float] | None = None,
    seq_len: int = 16,
) -> None:  # fmt: skip
    """These examples as one split of a tokens folder, with what the other split has where it is there."""
    beside = (["labels"] if view == "feedback" else []) + (["margins"] if margins else [])
    with SplitWriter(folder, split, VOCABULARY, beside) as writer:
        writer.extend(ids, masks)
        for label in (labels or []) if view == "feedback" else []:
            writer.label(label)
        for margin in margins or []:
            writer.margin(margin)
    meta = Meta(
        view=view, seq_len=seq_len, vocab_size=VOCABULARY, read={}, rows={}, tokens={"train": 0, "heldout": 0}, supervised={}, bytes={}, truncated=0,
        dropped={}, eos_token_id=EOS, stop_token_ids=[EOS],
    )  # fmt: skip
    if (folder / "meta.json").is_file():
        meta = json.loads((folder / "meta.json").read_text())
    meta["tokens"][split], meta["supervised"][split] = writer.tokens, writer.supervised
    write_meta(folder, meta)


def tiny_model(dropout: float = 0.0) -> Any:
    """A GPT-2 (all its dropouts at `dropout`) of 11k parameters, the same each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=1, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            eos_token_id=EOS, bos_token_id=EOS,
        )
    )  # fmt: skip


def tiny_llama(layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=None,
        )
    )  # fmt: skip


def tiny_reward_model() -> Any:
    """A Llama with one score, large enough weights for scores to differ."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=EOS, num_labels=1, initializer_range=0.1,
        )
    )  # fmt: skip


def adamw(**changes: Any) -> Optimizer:
    values = {"lr": 1e-2, "weight_decay": 0.1, "grad_clip": 1.0, "global_batch_tokens": 128, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **UNGUARDED}
    return AdamW(**{**values, "schedule": Cosine(warmup=0.2, final=0.1), **changes})


def parallel(devices: int = 1, **changes: Any) -> Parallel:
    values = {"micro_batch_size": None, "activation_checkpointing": "none", "compile": False, "data_workers": 0, "max_restarts": 0, "grace_s": 60.0, **changes}
    return Single(**values) if devices == 1 else DDP(devices=devices, **{"timeout_s": 1800.0, **values})


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "steps": 6, "rows_per_step": 8, "seq_len": 16, "seed": 3, "optimizer": adamw(), "param_dtype": "float32", "compute_dtype": "float32",
        "reduce_dtype": "float32", "buffer_dtype": "float32", "loss_scale": None, "parallel": parallel(), "log_every": 2, "save_every_s": 1e9,
    }  # fmt: skip
    return Recipe(**{**values, **changes})


class Lines(Report):
    """Keeps what is said, and may do something when step `at` is logged."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        self.logged: list[dict[str, float]] = []
        self.bars: list[tuple[int, int, str]] = []
        self.at, self.act = at, act

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append(dict(metrics))
        if step == self.at:
            self.act()

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.bars.append((done, total, text))


def context(folder: Path, report: Report | None = None, micro_batch_size: int | None = None, devices: int = 1) -> Context:
    mesh = parallel(devices).mesh(devices)
    placement = Placement(devices=devices, mesh=mesh, micro_batch_size=micro_batch_size)
    return Context(step="pretrain", folder=folder, out=folder / "checkpoint", inputs={}, placement=placement, report=report or Report())


def train(folder: Path, tokens: Path, *, dropout: float = 0.0, report: Report | None = None, micro: int | None = None, devices: int = 1, **changes: Any) -> Any:
    """Fit a tiny model on `tokens`; returns (metrics, final weights)."""
    from lmforge.training.fit import fit
    from lmforge.training.objectives.causal_lm import CausalLM

    folder.mkdir(parents=True, exist_ok=True)

    def save(model: Any) -> None:
        save_file({name: value.contiguous() for name, value in model.named_parameters()}, folder / "final.safetensors")

    told = recipe(**{"parallel": parallel(devices), **changes})
    metrics = fit(told, CausalLM(tokens, 16), tiny_model(dropout), context(folder, report, micro, devices), save)
    return metrics, load_file(folder / "final.safetensors")


def train_kto(folder: Path, report: Report, devices: int = 1, micro: int | None = None) -> Any:
    """Fit KTO, whose baseline is a mean over all ranks, on tokens of its own; returns the final weights."""
    from lmforge.training.fit import fit
    from lmforge.training.objectives.kto import Kto

    home = folder / f"rank-{os.environ.get('RANK', 0)}"
    write_tokens(home, "feedback")
    for name in ("train", "train_kl"):
        np.save(home / f"{name}.npy", np.random.default_rng(len(name)).uniform(-60, -20, 60).astype(np.float32))
    made: dict[str, Any] = {}
    told = recipe(parallel=parallel(devices), optimizer=adamw(eps=1e-5))
    fit(told, Kto(home, home, 0.3, 1.5, 0.7), tiny_model(), context(folder, report, micro, devices), lambda model: made.update(model.state_dict()))
    return made


def state_in(folder: Path, step: int | None = None) -> Any:
    """The whole state in a folder, None without one; a `step` is waited for, since states are written beside the training."""
    from lmforge.training import state

    deadline = time.monotonic() + 30
    while step and ((index := state.read_index(folder)) is None or index["step"] < step) and time.monotonic() < deadline:
        time.sleep(0.005)
    saved = state.open_state(folder)
    return None if saved is None else saved.tree()


def killed(folder: Path, tokens: Path, dropout: float) -> None:
    """Run until step 4's metrics are logged, a state saved after every step before, and die there by SIGKILL."""
    train(folder, tokens, dropout=dropout, report=Lines(4, lambda: os.kill(os.getpid(), signal.SIGKILL)), save_every_s=0.0, log_every=1)


def main(job: str, folder: Path, tokens: Path) -> None:
    if job == "killed":  # one import for both: the children are forked before any thread is started
        for dropout in (0.0, 0.2):
            if (child := os.fork()) == 0:
                killed(folder / f"dropout-{dropout}", tokens, dropout)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
    if job == "ddp":
        results = {}
        for name, changes in {"fp32": {}, "bf16": {"reduce_dtype": "bfloat16"}}.items():
            report = Lines()
            metrics, _ = train(folder / name, tokens, devices=2, micro=2, report=report, optimizer=adamw(eps=1e-5), **changes)
            results[name] = {"metrics": metrics, "logged": report.logged}
        report = Lines()
        weights = train_kto(folder, report, devices=2, micro=3)
        results["kto"] = {"logged": report.logged}
        if os.environ["RANK"] == "0":
            save_file({name: value.clone() for name, value in weights.items()}, folder / "kto.safetensors")
            (folder / "results.json").write_text(json.dumps(results))
        else:
            assert not any(one["logged"] for one in results.values())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
