"""From a job to what its kernels see: the passes of a workload as runs of layers, their FLOPs, and what adapters and precisions add."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lmforge.model.families import Weight
from lmforge.parallel.traffic import Moved
from lmforge.precision.nodes import dtype_bytes
from lmforge.predict.flops import hardware, layer_elements, scores_flops
from lmforge.predict.job import Job
from lmforge.predict.kernels import Scores
from lmforge.predict.layers import Run, low_rank
from lmforge.predict.rates import Rates
from lmforge.stage.base import Tuning, parameters
from lmforge.stage.workload import Pass, Workload

NO_FUSED = ("gemma2",)  # families whose attention transformers has no fused kernel for: their scores are capped
DORA_PASSES = 20.0  # bytes an element of an adapted matrix: PEFT makes W + BA and its norms anew in every forward


def moved(job: Job) -> Moved:
    """What its ranks have to send each other in a step."""
    precision = job.stage.precision
    return Moved(
        trained=job.load.trained,
        base=job.load.base,
        micro_batches=job.accumulation,
        tokens=job.rows * job.stage.row_tokens,
        width=job.shape.hidden,
        recomputes=job.stage.parallel.checkpointing != "none",
        param_bytes=precision.param_bytes,
        compute_bytes=dtype_bytes(precision.compute_dtype),
        reduce_bytes=dtype_bytes(precision.reduce_dtype),
    )


def learns(job: Job) -> bool:
    """Whether the model's own matrices have gradients."""
    return not isinstance(job.stage, Tuning) or job.stage.adapter.trains_all


def sharded(job: Job) -> bool:
    """Whether FSDP2 hands out weights in the dtype of products, so that activations have it too."""
    return job.stage.parallel.type == "mesh" and job.mesh["dp_shard"] * job.mesh["dp_replicate"] > 1


def run(job: Job, one: Pass) -> Run:
    """A pass as its kernels see it. A pair whose prompt is computed once is one sequence of prompt, chosen and rejected answer."""
    precision, parallel, mesh = job.stage.precision, job.stage.parallel, job.mesh
    width = dtype_bytes(precision.compute_dtype)
    shared = one.pairs and one.prompt is not None
    return Run(
        rows=one.sequences / 2 if shared else one.sequences,
        length=2 * one.length - (one.prompt or 0) if shared else one.length,
        width=width,
        stream=width if sharded(job) else precision.param_bytes,
        scores=scores(job, one),
        backward=one.backward,
        learns=learns(job),
        checkpointing=parallel.checkpointing,
        tp=mesh["tp"],
        whole_heads=any(style == "row_from_whole" for style in job.cut.splits.values()),
        compiled=parallel.compile,
    )


def scores(job: Job, one: Pass) -> Scores:
    """Packed documents and shared prompts take a mask."""
    if job.shape.family in NO_FUSED:
        return "stored"
    return "masked" if one.packed or (one.pairs and one.prompt is not None) else "causal"


def head_length(one: Pass) -> int:
    """Tokens of a run's row whose logits are made."""
    if one.scalar:
        return 0
    return 2 * one.logits if one.pairs and one.prompt is not None else one.logits


def extras(job: Job, one: Pass, run: Run, rates: Rates) -> dict[str, float]:
    """What all layers of a micro-batch take beyond the model's own kernels: an adapter's products, weights cast or dequantized, gradients added up."""
    found = {"elementwise": _casts(job, one, run) / rates.memory}
    if one.model in ("reference", "reward") or learns(job):
        return found
    trained = _adapter(job, run, rates)
    again = run.checkpointing == "full" and one.backward
    found["adapter"] = trained[0] * (2 if again else 1) + (trained[1] if one.backward else 0.0)
    found["dequantize"] = _dequantized(job, run) * (1 + one.backward + again) / rates.memory
    return found


def _casts(job: Job, one: Pass, run: Run) -> float:
    """Bytes of casting weights for autocast, once a forward and once more where it is repeated, and of casting their gradients back; FSDP2 casts its share
    of them. From the second micro-batch on a gradient is added to the one before."""
    width, trained = job.stage.precision.param_bytes, parameters(job.load.trained)
    elements = (parameters(job.weights) if one.model != "trained" or learns(job) else parameters(job.load.base)) / (job.mesh["tp"])
    share = 1 / job.mesh["dp_shard"] if sharded(job) else 1.0
    found = 0.0
    if run.width != width:
        times = (2 if run.checkpointing == "full" and one.backward else 1) * elements + (trained / job.mesh["tp"] if one.backward else 0)
        found += times * (width + run.width) * share
    if one.backward and job.accumulation > 1:
        found += 3 * width * trained / job.mesh["tp"] * share * (job.accumulation - 1) / job.accumulation
    return found


def _adapter(job: Job, run: Run, rates: Rates) -> tuple[float, float]:
    """Forward and backward of LoRA's pairs of matrices, by the shapes that are trained; DoRA's norms are bytes of the matrices beside them."""
    first = {one.name.partition(".lora_A")[0]: one for one in job.load.trained if ".lora_A" in one.name}
    second = {one.name.partition(".lora_B")[0]: one for one in job.load.trained if ".lora_B" in one.name}
    magnitudes = any("lora_magnitude" in one.name for one in job.load.trained)
    forward = backward = 0.0
    for module, a in first.items():
        rank, inputs = a.shape
        outputs = second[module].shape[0]
        taken = low_rank(run.tokens, inputs, outputs, rank, run, rates).times(a.count)
        normed = DORA_PASSES * inputs * outputs * a.count / rates.memory if magnitudes else 0.0
        forward, backward = forward + taken.forward + normed, backward + taken.backward
    return forward, backward


def _dequantized(job: Job, run: Run) -> float:
    """Bytes of one use of a base in 4 bits: it is read, and written in the dtype of products."""
    stage = job.stage
    if not isinstance(stage, Tuning) or stage.adapter.four_bit is None:
        return 0.0
    return layer_elements(job.shape, active=False) * run.width + stage.base_bytes(job.weights)


def model_flops(job: Job, work: Workload) -> float:
    """Of one data-parallel rank in a step, recomputation not counted: 6N + 6LdT a trained token (house), 4N + 6LdT where the base is frozen, and a third
    of 6N + 6LdT where a pass has no gradients. N are active parameters, embeddings included."""
    found = sum(work.accumulation * one.times * _model_flops(job, one) for one in work.passes)
    found += sum(one.times * _model_flops(job, one) for one in work.before)
    if drawn := work.rollout:
        length = drawn.prompt + drawn.new
        found += drawn.batches * drawn.sequences * length * (2 * _active(job.weights) + scores_flops(job.shape, length, causal=True))
    return found


def _model_flops(job: Job, one: Pass) -> float:
    active = _active(weight for weight in job.weights if not (one.scalar and weight.role == "head"))
    seen = run(job, one)
    past = scores_flops(job.shape, seen.length, causal=True)
    if not one.backward:
        return seen.tokens * (2 * active + past)
    own = 6 * active if learns(job) else 4 * active + 6 * parameters(job.load.trained)
    return seen.tokens * (own + 3 * past)


def _active(weights: Iterable[Weight]) -> float:
    return sum(math.prod(one.shape) * one.count * one.active for one in weights)


def hardware_flops(job: Job, work: Workload) -> float:
    """Of one data-parallel rank and its tensor and pipeline ranks in a step: products and attention as they are computed, whole squares under a mask."""
    found = sum(work.accumulation * one.times * _hardware_flops(job, one) for one in work.passes)
    found += sum(one.times * _hardware_flops(job, one) for one in work.before)
    if drawn := work.rollout:
        found += drawn.batches * drawn.sequences * (drawn.prompt + drawn.new) * hardware(
            job.shape, drawn.prompt + drawn.new, logits=1.0, causal=True, backward=False
        ).total  # fmt: skip
    return found


def _hardware_flops(job: Job, one: Pass) -> float:
    seen = run(job, one)
    found = hardware(
        job.shape,
        seen.length,
        logits=head_length(one) / seen.length,
        causal=seen.scores == "causal",
        checkpointing=seen.checkpointing,
        stored_scores=seen.scores == "stored",
        frozen=not seen.learns,
        backward=one.backward,
    ).total
    adapter = 0 if seen.learns else 6 * parameters(job.load.trained)
    return seen.tokens * (found + (adapter if one.backward else adapter / 3))
