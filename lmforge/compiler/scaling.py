"""What the sizes of each pretraining step mean: tokens a parameter, the compute-optimal sizes for its FLOPs, and the loss that a law expects."""

from __future__ import annotations

import dataclasses

from lmforge.plan import Plan, Step
from lmforge.predict import law as laws
from lmforge.stage.nodes import Pretrain


def scaled(plan: Plan) -> Plan:
    """The plan with these lines in the arithmetic of its pretraining steps; ConfigError where `law` names no law."""
    law = laws.read(plan.experiment.law) if plan.experiment.law is not None else None
    done: dict[str, Step] = {}
    for step in plan.steps:
        if isinstance(step.spec, Pretrain):
            cost = step.cost
            assert cost.params_total is not None
            assert cost.params_active is not None
            assert cost.tokens is not None
            lines = laws.said(law, cost.params_total, cost.params_active, cost.tokens, before(step, done))
            step = dataclasses.replace(step, arithmetic=(*step.arithmetic, *lines))
        done[step.name] = step
    return dataclasses.replace(plan, steps=tuple(done.values()))


def before(step: Step, steps: dict[str, Step]) -> int | None:
    """Tokens that its weights were pretrained on before it: 0 from scratch, those of earlier steps of the plan, None for weights from elsewhere."""
    start = next((steps[one.step] for one in step.inputs if one.kind == "checkpoint"), None)
    if start is None:
        return 0
    if not isinstance(start.spec, Pretrain) or start.cost.tokens is None:
        return None
    earlier = before(start, steps)
    return None if earlier is None else earlier + start.cost.tokens
