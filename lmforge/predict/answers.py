"""Memory of answers: drawn with a cache of keys and values, and compared with the starting policy's after training."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.hardware.nodes import Accelerator
from lmforge.predict.job import Job
from lmforge.predict.moments import Moment, Parts
from lmforge.predict.passes import kernel, recasts, widths
from lmforge.predict.tensors import walk
from lmforge.predict.tensors.run import Run
from lmforge.stage.base import parameters
from lmforge.stage.workload import Rollout

AT_ONCE = 16  # answers of a held-out pass (lmforge.training.rl.heldout.ANSWERS_AT_ONCE, which a test holds equal: that module needs torch)


def drawing(job: Job, rollout: Rollout, accelerator: Accelerator) -> Iterator[Moment]:
    """While the prompts are read, and at the last token (lmforge.inference.rollout).

    transformers' DynamicCache joins old and new keys, or values, of one layer at a time into a new tensor. Prompts of uneven lengths take a mask. A token is
    drawn from its logits by their log-softmax in float32 and a distribution function in float64. Autocast keeps its copies of trained weights all the while.
    """
    shape, (param, compute) = job.shape, widths(job)
    prompt, length = rollout.prompt + job.stage.positions, rollout.prompt + rollout.new + job.stage.positions
    run = Run(
        rows=rollout.sequences, length=prompt, param=param, compute=compute, kernel=kernel(job, accelerator, masked=True), masked=True, frozen=True,
        recasts=recasts(job),
    )  # fmt: skip
    # Rotary tables have the residual stream's dtype, and so have the keys that they turn, and a layer's cache all of it.
    width = max(param, compute) if shape.rotary_dim else compute
    both = 2 * rollout.sequences * shape.keys * width
    read = run.tokens * param
    copies = parameters(job.load.trained) * compute if run.autocast and not run.recasts and not job.load.base else 0
    around = read * (shape.hidden + 2 * shape.rotary_dim) + run.rows * prompt**2 + copies
    last = 0 if width != compute else both * prompt  # which the walk has too, where the kernel takes no copy of them
    yield "reading prompts", {"cache": shape.layers * both * prompt, "activations": walk.without_gradient(shape, run) + around - last}
    words = rollout.sequences * shape.vocab
    yield "drawing answers", {"cache": (shape.layers * both + both // 2) * length, "logits": words * (param + 4 + 8), "activations": copies}


def held_out(job: Job, rollout: Rollout) -> Parts:
    """The KL of whole distributions (lmforge.training.rl.heldout): both policies' logits, both log-softmaxes, and three products of them, in float32."""
    words = AT_ONCE * rollout.new * job.shape.vocab
    return {"logits": words * (2 * job.stage.precision.param_bytes + 5 * 4)}
