"""Seconds of the rollouts of PPO and GRPO: a prefill, then a decode step a token (inference/rollout.py, with a cache of keys and values)."""

from __future__ import annotations

import math

from lmforge.precision.nodes import dtype_bytes
from lmforge.predict.flops import layer_elements
from lmforge.predict.job import Job
from lmforge.predict.kernels import launches
from lmforge.predict.layers import Run, micro_batch
from lmforge.predict.links import beside, collective, group
from lmforge.predict.rates import Rates
from lmforge.stage.workload import Rollout

DRAWING = 60.0  # bytes a logit of drawing a token: float32 log-softmax, exponentials and their sums in float64 (inference/rollout.py)


def rollout(job: Job, drawn: Rollout, rates: Rates) -> float:
    """All batches of a step: answers as long as they may be, which is the most it takes."""
    return drawn.batches * (prefill(job, drawn, rates) + drawn.new * (decode(job, drawn, rates)))


def prefill(job: Job, drawn: Rollout, rates: Rates) -> float:
    """One forward pass over the prompts."""
    precision = job.stage.precision
    width = dtype_bytes(precision.compute_dtype)
    run = Run(rows=drawn.sequences, length=drawn.prompt, width=width, stream=precision.param_bytes, scores="masked", backward=False)
    return sum(micro_batch(job.shape, run, rates, layers=job.shape.layers, head_tokens=drawn.sequences).values())


def decode(job: Job, drawn: Rollout, rates: Rates) -> float:
    """One token of every sequence: bound by the bytes of weights and cache, by compute, or by the host that starts the kernels.

    Each weight is read once (Pope et al. 2022, arXiv 2211.05102, section 2), of experts those that the sequences meet; under autocast it is cast first.
    The cache has 2 L x keys elements a token, and grows from the prompt to the whole. Where weights are sharded every pass gathers them.
    """
    shape, precision, rows = job.shape, job.stage.precision, drawn.sequences
    width = dtype_bytes(precision.compute_dtype)
    active, all_of_them = layer_elements(shape), layer_elements(shape, active=False)
    met = active + (all_of_them - active) * (1 - (1 - shape.top_experts / shape.experts) ** rows if shape.experts else 0.0)
    elements, head = met, shape.hidden * shape.vocab
    cast = precision.param_bytes + 2 * width if precision.param_bytes != width else width
    cached = drawn.prompt + (drawn.new - 1) / 2
    moved = (elements + head) * cast + 2 * shape.layers * shape.keys * cached * rows * width + rows * shape.vocab * DRAWING
    computed = 2 * rows * (active + head) / rates.matmul
    started = shape.layers * launches(False, precision.param_bytes != width) * rates.launch * rates.residual
    taken = max(moved / rates.memory, computed) + started if not rates.gpu else max(moved / rates.memory, computed, started)
    return taken + gathering(job, taken, rates)


def gathering(job: Job, compute: float, rates: Rates) -> float:
    """What shows of gathering all weights for one forward pass."""
    ranks = job.mesh["dp_shard"]
    if ranks == 1 or job.stage.parallel.type != "mesh":
        return 0.0
    elements = sum(math.prod(one.shape) * one.count for one in (*job.load.trained, *job.load.base))
    size = elements * dtype_bytes(job.stage.precision.compute_dtype) * (ranks - 1) / ranks
    return beside(collective("all_gather", size, job.shape.layers + 1, group("dp_shard", job.mesh, rates)), compute, rates.exposed)
