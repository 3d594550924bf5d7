"""Prompts, rewards and short runs of PPO and GRPO for the tests here; as a script it is what their subprocesses run."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from lmforge.formats.tokens import Meta, SplitWriter, write_meta
from lmforge.reward.checked import Checked
from lmforge.reward.nodes import Episodes
from lmforge.step import Report

WANTED = 7  # the token that `share` pays for
STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {
        "kl_coef": 0.02, "kl_target": 0.5, "kl_horizon": 200, "gamma": 1.0, "gae_lambda": 0.95, "clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.5,
        "entropy_coef": 0.01, "whiten_advantages": True, "whiten_rewards": False,
    },
    "grpo": {"group_size": 4, "kl_coef": 0.02, "clip_low": 0.2, "clip_high": 0.28, "scale_rewards": "group", "loss_type": "dapo", "unbiased_kl": False},
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A word a token: "w7" is id 7, and id 0 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|end|>": 0, **{f"w{one}": one for one in range(1, tiny_run.VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def write_prompts(folder: Path, prompts: int = 24, longest: int = 6) -> Path:
    """A tokens:prompt folder with a reference answer for every other prompt."""
    generator = np.random.default_rng(3)
    meta = Meta(
        view="prompt", seq_len=longest, vocab_size=tiny_run.VOCABULARY, read={}, rows={}, tokens={}, supervised={}, bytes={}, truncated=0, dropped={},
        eos_token_id=0, stop_token_ids=[0],
    )  # fmt: skip
    for split in ("train", "heldout"):
        ids = [generator.integers(1, tiny_run.VOCABULARY, size=length).tolist() for length in generator.integers(1, longest + 1, size=prompts)]
        with SplitWriter(folder, split, tiny_run.VOCABULARY, ["answers"]) as writer:
            writer.extend(ids, [[0] * len(one) for one in ids])
            for index in range(prompts):
                writer.answer(f"w{index}" if index % 2 else None)
        meta["tokens"][split], meta["supervised"][split] = writer.tokens, writer.supervised
    write_meta(folder, meta)
    write_tokenizer(folder / "tokenizer")
    return folder


def share(episodes: Episodes) -> list[float]:
    """The share of the wanted token in each answer."""
    return [share_of(ids[start:]) for ids, start in zip(episodes.ids, episodes.starts, strict=True)]


def share_of(answer: list[int]) -> float:
    return answer.count(WANTED) / len(answer)


class Tables(tiny_run.Lines):
    """Keeps tables too."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        super().__init__(at, act)
        self.tables: list[tuple[str, Any, Any]] = []

    def table(self, title: str, columns: Any, rows: Any) -> None:
        self.tables.append((title, columns, rows))


def practice(tokens: Path, *, rows: int = 8, epochs: int = 2, minibatches: int = 2, scorer: Any = None, report: Report | None = None, **changes: Any) -> Any:
    """What both objectives hold; `changes` of Sampling, and of Practice itself."""
    from lmforge.training.rl.practice import Practice, Schedule
    from lmforge.training.rl.rollouts import Rollouts, Sampling

    sampling = Sampling(changes.pop("max_new_tokens", 6), changes.pop("temperature", 1.0))
    rollouts = Rollouts(tokens, "train", scorer or Checked("reward=share", share), sampling)
    schedule = Schedule(rows=rows, epochs=epochs, minibatches=minibatches, group_size=changes.pop("group_size", 1), seed=3)
    return Practice(schedule, rollouts, changes.pop("missing_eos_penalty", None), report or Report(), changes.pop("sample_every", None))


def parts(kind: str, tokens: Path, policy: Any = None, options: Mapping[str, Any] | None = None, **changes: Any) -> tuple[Any, Any]:
    """(objective, model) of PPO or GRPO, the reference a frozen copy of the policy."""
    from transformers import LlamaForSequenceClassification

    from lmforge.training.rl.actor_critic import ActorCritic, Critic
    from lmforge.training.rl.grpo import Grpo, GrpoOptions
    from lmforge.training.rl.ppo import Ppo, PpoOptions
    from lmforge.training.rl.reference import frozen

    policy = policy or tiny_run.tiny_llama()
    reference, told = frozen(copy.deepcopy(policy)), {**OPTIONS[kind], **(options or {})}
    if kind == "grpo":
        return Grpo(GrpoOptions(**told), practice(tokens, group_size=told["group_size"], **changes), reference), policy
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    torch.manual_seed(1)
    scorer = LlamaForSequenceClassification(config)
    scorer.model.load_state_dict(policy.model.state_dict())
    return Ppo(PpoOptions(**told), practice(tokens, **changes), reference), ActorCritic(policy, Critic(scorer, 0.0, 1.0))


def train(
    kind: str, folder: Path, tokens: Path, *, micro: int | None = None, devices: int = 1, report: Report | None = None, recipe: Any = None, **changes: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Fit; returns (metrics, final weights)."""
    from lmforge.training.fit import fit

    folder.mkdir(parents=True, exist_ok=True)
    objective, model = parts(kind, tokens, report=report, **changes)
    told = tiny_run.recipe(**{"steps": STEPS, "rows_per_step": objective.practice.schedule.rows, "parallel": tiny_run.parallel(devices), **(recipe or {})})

    def save(trained: Any) -> None:
        save_file({name: value.detach().clone() for name, value in trained.named_parameters()}, folder / "final.safetensors")

    metrics = fit(told, objective, model, tiny_run.context(folder, report, micro, devices), save)
    return metrics, load_file(folder / "final.safetensors")


def heldout(tokens: Path) -> dict[str, float]:
    """The figures of a policy beside another one, on a number of prompts that does not divide over two ranks."""
    from lmforge.training.rl.heldout import compare
    from lmforge.training.rl.reference import frozen
    from lmforge.training.rl.rollouts import Rollouts, Sampling

    rollouts = Rollouts(tokens, "heldout", Checked("reward=share", share), Sampling(6, 1.0))
    return compare(tiny_run.tiny_llama(layers=1), frozen(tiny_run.tiny_llama(layers=2)), rollouts, 7, seed=2)[0]


def killed(kind: str, folder: Path, tokens: Path) -> None:
    """Run until step 6's metrics are logged, in the middle of the second rollout, a state saved after every step before, and die there by SIGKILL."""
    train(kind, folder, tokens, report=Tables(6, lambda: os.kill(os.getpid(), signal.SIGKILL)), recipe={"save_every_s": 0.0, "log_every": 1})


def main(job: str, folder: Path, tokens: Path) -> None:
    for kind in ("ppo", "grpo"):
        if job == "killed":
            if (child := os.fork()) == 0:
                killed(kind, folder / kind, tokens)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
        if job == "ddp":
            report = Tables()
            train(kind, folder / kind, tokens, devices=2, micro=2, report=report, recipe={"optimizer": tiny_run.adamw(eps=1e-5)}, sample_every=4)
            found = heldout(tokens)
            if os.environ["RANK"] == "0":
                (folder / f"{kind}.json").write_text(json.dumps({"logged": report.logged, "tables": report.tables, "heldout": found}))
            else:
                assert not report.logged
                assert not report.tables


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
