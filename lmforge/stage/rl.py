"""PPO and GRPO as they run: policy, reference, reward and value model put together, trained, and looked at on held-out prompts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from lmforge.model import build
from lmforge.stage.reinforcement import Grpo, Ppo, Reinforcement
from lmforge.stage.train import recipe, save, starting_weights
from lmforge.step import Context
from lmforge.training import state
from lmforge.training.fit import fit
from lmforge.training.objective import Objective
from lmforge.training.preflight import preflight
from lmforge.training.recipe import Recipe
from lmforge.training.rl.actor_critic import ActorCritic, Critic
from lmforge.training.rl.grpo import Grpo as GrpoObjective
from lmforge.training.rl.grpo import GrpoOptions
from lmforge.training.rl.heldout import compare
from lmforge.training.rl.ppo import Ppo as PpoObjective
from lmforge.training.rl.ppo import PpoOptions
from lmforge.training.rl.practice import Practice, Schedule
from lmforge.training.rl.reference import Reference, adapter_off, frozen
from lmforge.training.rl.rollouts import Rollouts, Sampling

SHOWN = 16  # held-out answers in the last table


def train(stage: Reinforcement, context: Context) -> dict[str, Any]:
    """Train the policy from the checkpoint among the inputs; returns the last interval's metrics and those of held-out prompts, before and after."""
    tokens, told = context.inputs["tokens:prompt"], recipe(stage)
    scorer, sampling = stage.reward.open(context.inputs), Sampling(stage.max_new_tokens, stage.temperature)
    rollouts, heldout = (Rollouts(tokens, split, scorer, sampling) for split in ("train", "heldout"))
    state.check(context.folder / "state", context.placement.devices)
    policy: Any = starting_weights(stage, context)
    start = _reference(stage, context, told)
    practice = Practice(_schedule(stage, told), rollouts, stage.missing_eos_penalty, context.report, stage.sample_every)
    objective, model = _parts(stage, context, practice, policy, start)
    preflight(objective, model, tokens=tokens, checkpoint=context.inputs["checkpoint"], recipe=told, context=context)

    def keep(trained: Any) -> None:
        save(stage, getattr(trained, "policy", trained), tokens / "tokenizer", context)

    metrics = fit(told, objective, model, context, keep, tokens / "tokenizer")
    if torch.cuda.is_available():
        policy.to(torch.device("cuda", torch.cuda.current_device()))  # Lightning has put it back
    figures, answers = compare(policy, start, heldout, stage.eval_prompts, stage.seed)
    shown = range(min(SHOWN, len(answers.rewards)))
    rows = [[*texts, float(answers.rewards[one])] for one, texts in zip(shown, heldout.texts(answers, shown), strict=True)]
    context.report.table("held-out generations", ("prompt", "answer", "reward"), rows)
    return {**figures, **metrics}


def _schedule(stage: Reinforcement, told: Recipe) -> Schedule:
    group = stage.group_size if isinstance(stage, Grpo) else 1
    return Schedule(rows=told.rows_per_step, epochs=stage.epochs, minibatches=stage.minibatches, group_size=group, seed=stage.seed)


def _reference(stage: Reinforcement, context: Context, told: Recipe) -> Reference:
    """The starting policy: the adapter switched off, or the checkpoint once more, opened when it is first asked for."""
    if not stage.adapter.trains_all:
        return adapter_off(stage.adapter.off)

    @functools.cache
    def opened() -> Reference:
        return frozen(build.from_folder(context.inputs["checkpoint"], getattr(torch, told.param_dtype)))

    return lambda policy: opened()(policy)


def _parts(stage: Reinforcement, context: Context, practice: Practice, policy: Any, start: Reference) -> tuple[Objective, Any]:
    """The objective, and the module it trains."""
    if isinstance(stage, Ppo):
        return PpoObjective(_ppo_options(stage), practice, start), ActorCritic(policy, _critic(stage, context))
    assert isinstance(stage, Grpo)
    reference = start if stage.kl_coef or not stage.adapter.trains_all else None  # no copy for a KL that counts nothing
    return GrpoObjective(_grpo_options(stage), practice, reference), policy


def _ppo_options(stage: Ppo) -> PpoOptions:
    """The stage's keys that the loss reads."""
    return PpoOptions(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(PpoOptions)})


def _grpo_options(stage: Grpo) -> GrpoOptions:
    """The stage's keys that the loss reads."""
    return GrpoOptions(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(GrpoOptions)})


def _critic(stage: Ppo, context: Context) -> Critic:
    """From the reward model, or from the policy's weights with a head of zeros: every value then starts at 0."""
    scorer: Any = build.scorer_from_folder(context.inputs["reward_model" if stage.value_start == "reward" else "checkpoint"])
    return Critic(scorer if stage.adapter.trains_all else stage.adapter.attach(scorer, stage.seed), *stage.value_affine)
