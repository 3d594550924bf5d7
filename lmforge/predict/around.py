"""What the ways to share a step over ranks keep on a device beside its tensors: gathered weights, gradients on their way, buckets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmforge.hardware.nodes import Accelerator
from lmforge.model.families import Weight
from lmforge.precision.nodes import dtype_bytes
from lmforge.predict.job import Job
from lmforge.predict.static import Static
from lmforge.stage.base import parameters

BUCKET = 25 * 2**20  # DDP: bytes of gradients that are summed at once (torch's bucket_cap_mb); a larger one is alone
ZERO_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements, which our config leaves at that
ZERO_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance, in elements
ZERO_PREFETCH = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size, in elements


@dataclass(frozen=True)
class Around:
    """Bytes of buffers while something runs; one device has none."""

    always: int = 0
    moving: int = 0  # more while gradients are on their way, in backward
    reduces: bool = False  # gradients of a layer go to their owners as soon as they are there
    waits: bool = True  # but for those of the head, which go with the embedding's
    kept_grads: int = 0  # of a layer, of the rank's own part; 0 where they are there already

    ahead: int = 1  # layers that a layer's backward gathers while it runs

    @property
    def forward(self) -> int:
        """In a layer's forward."""
        return self.always

    @property
    def scored(self) -> int:
        """In the loss, outside the model."""
        return self.always

    def backward(self, layer: int, layers: int) -> int:
        """In a layer's backward."""
        return self.always + self.moving

    def reducing(self, layer: int) -> int:
        """After a layer's backward, while its gradients go to their owners."""
        return self.always + self.moving

    @property
    def embedding(self) -> int:
        """In the embedding's backward."""
        return self.always + self.moving

    @property
    def ending(self) -> int:
        """While what lies outside the layers is reduced."""
        return self.always + self.moving


@dataclass(frozen=True)
class Buckets(Around):
    """DDP (Li et al. 2020) where gradients are summed in another dtype: a bucket's mean, and its copy in that dtype, while the bucket's layers are done.

    Gradients are views of the buckets, so that nothing else is kept.
    """

    bucket: int = 0  # bytes
    layer_grads: int = 0
    copy: float = 0.0  # a copy's share of a bucket

    def backward(self, layer: int, layers: int) -> int:
        return self._of((layers - 1 - layer) * self.layer_grads)

    def _of(self, done: int) -> int:
        return int(self.bucket * (1 + self.copy)) if done >= self.bucket else 0

    @property
    def embedding(self) -> int:
        return self._of(self.bucket)


@dataclass(frozen=True)
class Gathered(Around):
    """FSDP2 (Zhao et al. 2023), as torch/distributed/fsdp/_fully_shard runs it; all in bytes.

    An all-gather's flat output is copied into weights of their own. In forward it is held until the next one is copied; in backward it goes at once, but the
    next layer's is there already. A layer's whole gradients are copied into a reduce-scatter's input, which is held until the next layer's.
    The root's weights (embedding, final norm, head) are there while the model's forward runs, and from its backward's begin to its end.
    """

    layer: int = 0  # a layer's gathered weights
    root: int = 0  # those of what lies outside the layers
    layer_grads: int = 0  # a layer's whole gradients
    root_grads: int = 0
    layer_sum: int = 0  # the input of a reduce-scatter
    root_sum: int = 0
    degree: int = 1
    layers: int = 1
    reshards: bool = True
    prefetch: int = 0
    copies: bool = False  # gloo reduces and scatters a copy

    @property
    def forward(self) -> int:
        here = self.layer if self.reshards else self.layers * self.layer
        return self.always + self.root + here + (1 + self.prefetch) * self.layer

    @property
    def scored(self) -> int:
        return self.always + (0 if self.reshards else self.layers * self.layer + self.root)

    def backward(self, layer: int, layers: int) -> int:
        ahead = self._ahead(layer)
        summed = self.layer_sum if layer < layers - 1 else 0
        return self.always + self.root + self.layer + ahead + summed

    def reducing(self, layer: int) -> int:
        after = self.layer_sum // self.degree + (self.layer_sum if self.copies else 0)
        return self.always + self.root + self._ahead(layer) + self.layer_sum + max(self.layer_grads, after)

    def _ahead(self, layer: int) -> int:
        """Of the layers before this one, those whose weights are there or on their way."""
        return (min(layer, self.ahead) if self.reshards else layer) * self.layer

    @property
    def embedding(self) -> int:
        return self.always + self.root + self.layer_sum

    @property
    def ending(self) -> int:
        after = self.root_sum // self.degree + (self.root_sum if self.copies else 0)
        return self.always + self.root_sum + max(self.root_grads, after)


def around(job: Job, held: Static, accelerator: Accelerator, number: int = 0) -> Around:
    """Of the stage's own parallel option, on the device that `held` is of, for one of the networks that are trained."""
    parallel = job.stage.parallel
    if parallel.flat:
        return _zero(job)
    if parallel.type == "ddp" and job.placement.devices > 1:
        return _buckets(job)
    mesh = job.mesh
    return _gathered(job, held, accelerator, number) if mesh["dp_shard"] * mesh["dp_replicate"] > 1 else Around()


def _gathered(job: Job, held: Static, accelerator: Accelerator, number: int) -> Gathered:
    precision, parallel, mesh = job.stage.precision, job.stage.parallel, dict(job.mesh)
    compute, reduce, param = (dtype_bytes(one) for one in (precision.compute_dtype, precision.reduce_dtype, precision.param_dtype))
    # As if nothing were cut over dp_shard: what one rank of a stage, with its part of each matrix, has of a model.
    cut = dataclasses.replace(job.cut, mesh=mesh | {"dp_shard": 1})
    at = dict.fromkeys(mesh, 0) | {"pp": held.stage}
    trained = cut.held_at(networks(job.load.trained)[number], at)
    base = networks(job.load.base)
    everything = [*trained, *(cut.held_at(base[number], at) if base else ())]
    of_layers = [one for one in everything if "{layer}" in one.name]
    layers = max((one.count for one in of_layers), default=1)
    layer, whole = sum(math.prod(one.shape) for one in of_layers), sum(one.numel for one in everything)
    learned = sum(math.prod(one.shape) for one in trained if "{layer}" in one.name)
    root, root_learned = whole - sum(one.numel for one in of_layers), sum(one.numel for one in trained if "{layer}" not in one.name)
    return Gathered(
        reduces=True,
        kept_grads=0 if job.accumulation > 1 else -(-learned // mesh["dp_shard"]) * param,
        layer=layer * compute,
        root=root * compute,
        layer_grads=learned * compute,
        root_grads=root_learned * compute,
        layer_sum=learned * reduce,
        root_sum=root_learned * reduce,
        degree=mesh["dp_shard"],
        copies=accelerator == "cpu",
        layers=layers,
        reshards=getattr(parallel, "reshard_after_forward", True),
        prefetch=getattr(parallel, "prefetch", 0),
        ahead=max(1, getattr(parallel, "prefetch", 0)),  # FSDP2's own order gathers one
    )


def networks(weights: Sequence[Weight]) -> list[list[Weight]]:
    """The weights of each network: a name that comes again begins another one, as PPO's value model after its policy."""
    found: list[list[Weight]] = []
    names: set[str] = set()
    for one in weights:
        if not found or one.name in names:
            found.append([])
            names = set()
        found[-1].append(one)
        names.add(one.name)
    return found


def _buckets(job: Job) -> Around:
    """DDP's; none where gradients are summed in their own dtype."""
    param, reduce = job.stage.precision.param_bytes, dtype_bytes(job.stage.precision.reduce_dtype)
    if param == reduce:
        return Around()
    trained = job.load.trained
    largest = max(math.prod(one.shape) for one in trained) * param
    learned = sum(math.prod(one.shape) for one in trained if "{layer}" in one.name) * param
    return Buckets(bucket=min(max(BUCKET, largest), parameters(trained) * param), layer_grads=learned, copy=reduce / param)


def _zero(job: Job) -> Around:
    """DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py): a float32 master copy of the rank's part though weights are float32 already, a bucket that
    gradients are copied into, and in stage 3 the weights that are gathered: those used again within a thousand million elements are not let go."""
    parallel, precision, devices = job.stage.parallel, job.stage.precision, job.placement.devices
    trained, everything = parameters(job.load.trained), parameters((*job.load.trained, *job.load.base))
    master = 0 if parallel.offloads("optimizer") else -(-trained // devices) * 4
    gathered = min(everything, ZERO_LIVE + ZERO_PREFETCH) * precision.param_bytes if parallel.shard_degree("params", devices) > 1 else 0
    always = master + ZERO_BUCKET * precision.param_bytes + gathered
    if parallel.shard_degree("grads", devices) == 1:
        return Around(always=always)
    learned = sum(math.prod(one.shape) for one in job.load.trained if "{layer}" in one.name) * precision.param_bytes
    moving = min(trained, ZERO_BUCKET) * precision.param_bytes  # a full bucket is put together once more
    return Around(always=always, moving=moving, reduces=True, waits=False, kept_grads=0 if job.accumulation > 1 else -(-learned // devices))
