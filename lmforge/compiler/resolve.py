"""resolve: what was left open follows from what was said, with the arithmetic shown; then every step gets its digest.

Two ways to say the same thing (a budget in tokens or in steps) end as the same step, so they share a digest.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lmforge.codec import digest, encode
from lmforge.errors import PlanError
from lmforge.formats import store
from lmforge.model.weights import ParamCount, count, max_positions
from lmforge.plan import Plan, Step
from lmforge.stage.nodes import Budget, TrainingStage

ROWS = 64  # rows of a global batch where none is given: enough to split over a node, small enough for a laptop


def resolve(plan: Plan) -> Plan:
    """The plan with sequence lengths, batches, budgets and digests filled in."""
    config = plan.experiment.model.config()
    cache = store.cache(plan.experiment.output, "content.json")
    done: list[Step] = []
    for step in plan.steps:
        if isinstance(step.spec, TrainingStage):
            step = _training(step, step.spec, config)
        done.append(_identified(step, done, cache))
    return dataclasses.replace(plan, steps=tuple(done))


def _training(step: Step, stage: TrainingStage, config: dict[str, Any]) -> Step:
    seq_len = stage.length(max_positions(config))
    stage = dataclasses.replace(stage, seq_len=seq_len)
    arithmetic = []
    batch = stage.optimizer.global_batch_tokens
    if batch is None:
        batch = ROWS * stage.row_tokens
        arithmetic.append(f"global_batch_tokens = {ROWS} rows x {stage.row_tokens:,} = {batch:,}")
    if batch % stage.row_tokens:
        near = max(1, round(batch / stage.row_tokens)) * stage.row_tokens
        raise PlanError(
            f"stage.{step.name}.optimizer.global_batch_tokens",
            f"{batch:,} tokens are no whole number of rows of {stage.sequences_per_row} x {seq_len:,} tokens",
            f"the nearest is {near}",
        )
    budget, line = _steps(stage.budget, batch, flops_per_token(count(config), seq_len), count(config).total)
    optimizer = dataclasses.replace(stage.optimizer, global_batch_tokens=batch)
    spec = dataclasses.replace(stage, optimizer=optimizer, budget=budget)
    rows = (
        f"{batch:,} tokens a step = {batch // stage.row_tokens:,} rows x {stage.sequences_per_row} x {seq_len:,}"
        if stage.sequences_per_row > 1
        else (f"{batch:,} tokens a step = {batch // stage.row_tokens:,} rows x {seq_len:,}")
    )
    own = spec.account(batch // stage.row_tokens, budget.steps or 0)
    return dataclasses.replace(step, spec=spec, arithmetic=(*arithmetic, rows, line, *own))


def _steps(budget: Budget, batch: int, per_token: float, params: int) -> tuple[Budget, str]:
    """The budget in steps, and how it came about. Rounded up: a budget is spent in whole steps."""
    if budget.steps is not None:
        steps, said = budget.steps, f"{budget.steps:,} steps"
    elif budget.flops is not None:
        steps = math.ceil(budget.flops / (per_token * batch))
        said = f"{budget.flops:.3g} FLOPs / ({per_token:.3g} a token x {batch:,}) = {steps:,} steps"
    else:
        tokens = budget.tokens or math.ceil((budget.tokens_per_parameter or 0) * params)
        steps = math.ceil(tokens / batch)
        ratio = f"{budget.tokens_per_parameter:g} x {params:,} parameters = " if budget.tokens is None else ""
        said = f"{ratio}{tokens:,} tokens / {batch:,} = {steps:,} steps"
    return Budget(tokens=None, steps=steps, flops=None, tokens_per_parameter=None), f"{said} = {steps * batch:,} tokens"


def flops_per_token(params: ParamCount, seq_len: int) -> float:
    """Training FLOPs a token: 6N + 6*L*d*T, causal attention (half of the full square), N active parameters, embeddings included."""
    return 6 * params.active + 6 * params.layers * params.attention_width * seq_len


def _identified(step: Step, before: list[Step], cache: Path | None) -> Step:
    """What a step *is*: its node's identity keys, its content, and the digests of what it consumes."""
    spec = step.spec
    content = spec.content(cache)
    digests = {one.name: one.digest for one in before}
    identity = {
        "group": step.group,
        "type": step.stage,
        "revision": type(spec).code_revision,
        "keys": encode(spec, identity=True),
        "content": content,
        "inputs": [[one.kind, digests[one.step]] for one in step.inputs],
    }
    return dataclasses.replace(step, content=content, digest=digest(identity))
