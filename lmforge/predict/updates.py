"""What an optimizer makes beside its states while it updates, and lets go of."""

from __future__ import annotations

import math

from lmforge.optimizer.groups import decays, role
from lmforge.predict.job import Job
from lmforge.predict.static import Static


def temporaries(job: Job, held: Static) -> int:
    """Bytes at an update's fullest. Fused Adam, AdamW and SGD, and bitsandbytes' kernels, work in place."""
    kind, width = job.stage.optimizer.type, job.stage.precision.param_bytes
    at = dict.fromkeys(job.mesh, 0) | {"pp": held.stage}
    shards = job.cut.held_at(job.load.trained, at)
    if kind == "adafactor":  # torch's loop: a new estimate, while the last one's name still holds it
        return 2 * max(math.prod(one.shape) for one in shards) * width
    if kind == "muon":
        matrices = [one.shape for one in job.load.trained if len(one.shape) == 2 and role(one.name, one.shape) == "matrix"]
        return max((_newton_schulz(shape, width) for shape in matrices), default=0)
    if kind in ("sgd", "momentum") and job.stage.parallel.type == "mesh" and job.stage.optimizer.weight_decay:
        return sum(one.numel for one in shards if decays(one.name, one.shape)) * width  # not fused over DTensors: gradients plus decay are a list of their own
    return 0


def _newton_schulz(shape: tuple[int, ...], width: int) -> int:
    """torch.optim._muon: the update, two bfloat16 copies of it, the last matrix's, and two squares of its smaller side (Jordan et al. 2024)."""
    small = min(shape)
    return math.prod(shape) * (width + 3 * 2) + 2 * small * small * 2
