"""From a stage's passes to runs on a device: widths, kernels, and how a pair's prompt is shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lmforge.adapter.low_rank import LowRank as LowRankAdapter
from lmforge.hardware.nodes import Accelerator
from lmforge.model.weights import splits
from lmforge.precision.nodes import dtype_bytes
from lmforge.predict.job import Job
from lmforge.predict.tensors.compiled import known
from lmforge.predict.tensors.families import ORDER
from lmforge.predict.tensors.run import Attended, Kernel, LowRank, Run
from lmforge.stage.workload import Pass

WORTH = 0.9  # a prompt is shared where the pair then has at most so many of its tokens (lmforge.training.shared_prompt)
INDEX = 8  # bytes of an id, a label, a position


def low_rank(job: Job) -> LowRank | None:
    """The stage's LoRA, by the names of the matrices it sits on; None where it has none."""
    adapter = getattr(job.stage, "adapter", None)
    if not isinstance(adapter, LowRankAdapter):
        return None
    targets = frozenset(one.module.rpartition("{layer}.")[2] for one in adapter.layers(job.weights))
    return LowRank(adapter.r, targets, adapter.dropout if drops_out(job) else 0.0, adapter.four_bit is not None, adapter.magnitude)


def drops_out(job: Job) -> bool:
    """Whether a stage trains with dropout: those that compare with another policy switch it off."""
    load = job.workload
    return not load.before and load.rollout is None and all(one.scalar or not one.pairs for one in load.passes)


def widths(job: Job) -> tuple[int, int]:
    """Bytes of a weight as a layer sees it, and of what products take. FSDP2 hands weights out in the dtype of products."""
    precision = job.stage.precision
    compute = dtype_bytes(precision.compute_dtype)
    return (compute if sharded(job) else precision.param_bytes), compute


def kernel(job: Job, accelerator: Accelerator, masked: bool) -> Kernel:
    """The kernel that torch's scaled dot product attention takes: flash has neither masks nor float32, the efficient one no shared keys."""
    if job.shape.kind == "gemma2":
        return "eager"  # its scores are capped, which only eager attention does
    if accelerator == "cpu":
        return "cpu"
    if masked:
        return "efficient"
    if dtype_bytes(job.stage.precision.compute_dtype) == 2:
        return "flash"
    return "efficient" if job.shape.heads == job.shape.kv_heads else "eager"


@dataclass(frozen=True)
class Passed:
    """A stage's pass as it runs on a device."""

    run: Run
    predicted: int  # tokens with logits, or with a number
    batch: int  # bytes of a micro-batch
    scalar: bool
    entropy: bool


def passed(job: Job, one: Pass, accelerator: Accelerator) -> Iterator[Passed]:
    """How a pass runs; in two ways where it is of pairs with prompts of unknown length: none, and the shortest that is shared."""
    if not one.pairs:
        predicted = one.sequences * (one.logits - max(0, (one.prompt or 0) - 1) if one.logits else 1)
        yield _passed(job, one, _run(job, one, accelerator), predicted, one.sequences * one.length * 3 * INDEX)
        return
    prompts = (0, one.length - round(WORTH * one.length) + 1) if one.prompt is None else (one.prompt,)
    for prompt in prompts:
        yield (_shared if shares(one.length, prompt) else _plain)(job, one, prompt, accelerator)


def _passed(job: Job, one: Pass, run: Run, predicted: int, batch: int) -> Passed:
    return Passed(run, predicted, batch, one.scalar, one.entropy)


def shares(length: int, prompt: int) -> bool:
    """Whether a pair of `length` tokens each is run as one row with its first `prompt` tokens once."""
    return 2 * length - (prompt - 1) <= WORTH * 2 * length


def _plain(job: Job, one: Pass, prompt: int, accelerator: Accelerator) -> Passed:
    """Both of a pair as rows of their own. The batch holds them in one row too, and says how to take them apart."""
    tokens = one.sequences * one.length
    unlabelled = 0 if one.over_prompt else max(0, prompt - 1)
    predicted = one.sequences if one.scalar else tokens - one.sequences * unlabelled
    return _passed(job, one, _run(job, one, accelerator), predicted, 6 * tokens * INDEX)


def _shared(job: Job, one: Pass, prompt: int, accelerator: Accelerator) -> Passed:
    """A pair's prompt, both answers after it: one token less than the prompt has is shared, for the last predicts the answers' first."""
    rows, shared = one.sequences // 2, max(0, prompt - 1)
    answer = one.length - shared
    width = shared + 2 * answer
    part = Attended(answer, one.length, answer * one.length)
    attended = (*([Attended(shared, shared)] if shared else []), part, part)
    predicted = one.sequences if one.scalar else rows * (width if one.over_prompt else 2 * answer)
    batch = rows * INDEX * (3 * width + shared + 2 + 2 * one.length) + one.length * INDEX
    return _passed(job, one, _run(job, one, accelerator, attended, rows, width), predicted, batch)


def _run(job: Job, one: Pass, accelerator: Accelerator, attended: tuple[Attended, ...] = (), rows: int = 0, length: int = 0) -> Run:
    param, compute = widths(job)
    parallel, tp = job.stage.parallel, job.mesh["tp"]
    split = splits(job.config).items() if tp > 1 else ()
    return Run(
        rows=rows or one.sequences,
        length=length or one.length,
        param=param,
        compute=compute,
        kernel=kernel(job, accelerator, one.packed or bool(attended)),
        masked=one.packed,
        checkpointing=parallel.checkpointing,
        compiled=parallel.compile,
        frozen=bool(job.load.base),
        adapter=low_rank(job),
        accumulated=kept(job) and not reduced(job),
        attended=attended,
        recasts=recasts(job),
        tp=tp,
        splits=tuple((name.rpartition("{layer}.")[2], style) for name, style in split),
    )


def kept(job: Job) -> bool:
    """Whether gradients are there before backward: of earlier micro-batches, or as DDP's buckets, which never go."""
    return job.accumulation > 1 or (job.stage.parallel.type == "ddp" and job.placement.devices > 1)


def reduced(job: Job) -> bool:
    """Whether a layer's whole gradients go to their owners at once, so that they are new ones for every micro-batch."""
    return sharded(job) or (job.stage.parallel.flat and job.stage.parallel.shard_degree("grads", job.placement.devices) > 1)


def recasts(job: Job) -> bool:
    """Whether products save what they were given and cast it again: ZeRO-3 puts one of its own in torch's place (DeepSpeed 0.19, runtime/zero/linear.py)."""
    return job.stage.parallel.flat and job.stage.parallel.shard_degree("params", job.placement.devices) > 1


def sharded(job: Job) -> bool:
    """Whether FSDP2 hands out weights."""
    return job.stage.parallel.type == "mesh" and job.mesh["dp_shard"] * job.mesh["dp_replicate"] > 1


def seen(job: Job) -> bool:
    """Whether the model's operations have been followed: those of its family, all layers alike, without dropout."""
    alike = job.shape.sparse_layers in (0, job.shape.layers)
    if job.shape.kind not in ORDER or not alike or (drops_out(job) and job.shape.dropout):
        return False
    return not job.stage.parallel.compile or all(known(job.shape, one.run) for every in job.workload.passes for one in passed(job, every, "cpu"))
