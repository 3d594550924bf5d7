"""What a device sends in an optimizer step, in bytes, by collective; it receives as much.

Collectives are counted as rings run them (Rajbhandari et al. 2020, ZeRO, section 7): over n ranks a device sends n - 1 of n parts in an all-gather or a
reduce-scatter, and twice that in an all-reduce. A step is the forward and backward passes of its micro-batches at full length; rollouts, norms, metrics
and states come on top. What each engine moves is said where it is counted, and held against the collectives that torch issues in tests/parallel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lmforge.parallel.shards import Cut, Sized

Traffic = Mapping[str, int]  # all_gather, reduce_scatter, all_reduce, send -> bytes


BUCKET = 25 * 2**20  # bytes of gradients that DDP sums at once (torch's bucket_cap_mb)


class Sent(NamedTuple):
    """What a device sends along one axis of the mesh in a step, in collectives of one kind."""

    axis: str
    kind: str
    size: int  # bytes
    messages: int = 1  # collectives that they are
    waits: bool = False  # whether compute has to wait for it in any case


def by_kind(sent: Iterable[Sent]) -> Traffic:
    """Bytes by collective, all axes together."""
    found: Counter[str] = Counter()
    for one in sent:
        found[one.kind] += one.size
    return {kind: size for kind, size in found.items() if size}


@dataclass(frozen=True)
class Moved:
    """What there is to move in a step. Bytes are those of one element."""

    trained: Sequence[Sized]
    base: Sequence[Sized]  # frozen, in the model that is trained: gathered like the rest, but without gradients
    micro_batches: int
    tokens: int  # of a micro-batch
    width: int  # of the residual stream
    recomputes: bool  # layers run forward once more in backward
    param_bytes: int
    compute_bytes: int
    reduce_bytes: int


def all_reduce(ranks: int, size: int) -> int:
    """Sent by each of `ranks` in an all-reduce of `size` bytes."""
    return 2 * (ranks - 1) * size // ranks


def exchanged(ranks: int, part: int) -> int:
    """Sent by each of `ranks` in an all-gather or a reduce-scatter of parts of `part` bytes."""
    return (ranks - 1) * part


def elements(tensors: Sequence[Sized]) -> int:
    """Elements of whole tensors."""
    return sum(math.prod(one.shape) * one.count for one in tensors)


def copies(ranks: int, moved: Moved) -> list[Sent]:
    """DDP: one all-reduce of all gradients a step (Li et al. 2020), in buckets."""
    size = elements(moved.trained) * moved.reduce_bytes
    return [Sent("dp_replicate", "all_reduce", all_reduce(ranks, size), -(-size // BUCKET))]


def zero(stage: int, ranks: int, moved: Moved) -> list[Sent]:
    """ZeRO (Rajbhandari et al. 2020, section 7): stages 1 and 2 sum gradients to their owners and gather the new weights once a step.

    Stage 2 sums them after every micro-batch, and stage 3 too, which gathers weights in every forward and every backward instead: in the dtype of matrix
    products where gradients are summed in that too, for DeepSpeed has one for both.
    """
    share, all_of_it = -(-elements(moved.trained) // ranks), -(-elements((*moved.trained, *moved.base)) // ranks)
    gathered = 2 * moved.micro_batches * all_of_it * max(moved.compute_bytes, moved.reduce_bytes) if stage == 3 else share * moved.param_bytes
    summed = share * moved.reduce_bytes * (moved.micro_batches if stage > 1 else 1)
    tensors = sum(one.count for one in (*moved.trained, *moved.base))
    return [
        Sent("dp_shard", "all_gather", exchanged(ranks, gathered), 2 * moved.micro_batches * tensors if stage == 3 else 1, waits=stage < 3),
        Sent("dp_shard", "reduce_scatter", exchanged(ranks, summed), moved.micro_batches if stage > 1 else 1),
    ]


def mesh(cut: Cut, moved: Moved, *, reshards: bool) -> list[Sent]:
    """A mesh, on a device of the pipeline stage that sends most. `reshards`: FSDP2 frees gathered weights after forward."""
    sharded = cut.mesh["dp_replicate"] * cut.mesh["dp_shard"] > 1
    # FSDP2 hands out weights in the dtype of matrix products, so that all activations have it; under autocast alone most have that of the weights.
    activation = moved.compute_bytes if sharded else moved.param_bytes
    found = [[*_sharding(cut, moved, at, reshards), *_tensor(cut, moved, at, activation), *_pipeline(cut, moved, at, activation)] for at in cut.first_ranks()]
    return max(found, key=lambda sent: sum(one.size for one in sent))


def _sharding(cut: Cut, moved: Moved, at: Mapping[str, int], reshards: bool) -> Iterator[Sent]:
    """FSDP2 and HSDP (Zhao et al. 2023).

    Weights are gathered for every forward, and again for every backward where they are freed between. Gradients go to their owners after every
    micro-batch, and once a step between copies. A pipeline has several micro-batches on their way, so where weights are not freed they stay through a step.
    """
    ranks, replicas, pipelined = cut.mesh["dp_shard"], cut.mesh["dp_replicate"], cut.mesh["pp"] > 1
    held = cut.held_at(moved.trained, at)
    trained = sum(one.numel for one in held)
    everything = trained + sum(one.numel for one in cut.held_at(moved.base, at))
    layers = max((one.count for one in held), default=0) + 1  # each is a collective of its own, and what is not in a layer is another
    gathers = 1 if pipelined and not reshards else moved.micro_batches * (1 + reshards)
    yield Sent("dp_shard", "all_gather", gathers * exchanged(ranks, everything * moved.compute_bytes), gathers * layers)
    yield Sent("dp_shard", "reduce_scatter", moved.micro_batches * exchanged(ranks, trained * moved.reduce_bytes), moved.micro_batches * layers)
    yield Sent("dp_replicate", "all_reduce", all_reduce(replicas, trained * moved.reduce_bytes), layers)


def _tensor(cut: Cut, moved: Moved, at: Mapping[str, int], activation: int) -> Iterator[Sent]:
    """Activations between tensor-parallel ranks, by how each matrix is split (engine/tensor.py); the next product waits for each.

    Megatron (Narayanan et al. 2021, section 3.2) has two all-reduces of a layer in forward and two in backward. Here forward is the same; in
    backward each matrix that is split by outputs sums the gradient of its input by itself, so a layer of Llama's has five. Recomputing repeats what
    forward does, up to the last thing that backward needs: the sum at the end of a layer only where a norm takes it.
    """
    ranks = cut.mesh["tp"]
    if ranks == 1:
        return
    ends_in_norm = any(".post_feedforward_layernorm." in one.name for one in moved.trained)
    for module, shape, layers in _split(cut, moved.trained, at):
        style, passes = cut.splits[module], layers * moved.micro_batches
        times = passes * moved.tokens
        again = moved.recomputes and "{layer}" in module and (ends_in_norm or not module.endswith(".mlp.down_proj"))
        forward = 1 + again
        if style in ("row", "row_from_whole"):
            yield _summed(ranks, forward * times * shape[0] * moved.compute_bytes, forward * passes)
        if style == "row_from_whole":
            yield _collected(ranks, times * -(-shape[1] // ranks) * moved.compute_bytes, passes)
        if style == "vocabulary":
            yield _summed(ranks, times * shape[1] * activation, passes)
        if style in ("column", "column_gathered"):
            yield _summed(ranks, times * shape[1] * activation, passes)
        if style == "column_gathered":
            yield _collected(ranks, forward * times * -(-shape[0] // ranks) * moved.compute_bytes, forward * passes)


def _summed(ranks: int, size: int, messages: int) -> Sent:
    return Sent("tp", "all_reduce", all_reduce(ranks, size), messages, waits=True)


def _collected(ranks: int, part: int, messages: int) -> Sent:
    return Sent("tp", "all_gather", exchanged(ranks, part), messages, waits=True)


def _split(cut: Cut, tensors: Sequence[Sized], at: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Each split matrix that a stage runs: its module, its whole shape, and in how many layers; a head that is the embedding runs as a head too."""
    whole = {one.name: one.shape for one in tensors}
    for held in cut.held_at(tensors, at):
        module, _, kind = held.name.rpartition(".")
        if kind == "weight" and module in cut.splits:
            yield module, whole[held.name], held.count
    tied = "lm_head" in cut.splits and "lm_head.weight" not in whole and "score.weight" not in whole
    table = next((name for name, style in cut.splits.items() if style == "vocabulary"), None)
    if tied and table is not None:
        yield "lm_head", whole[f"{table}.weight"], 1


def _pipeline(cut: Cut, moved: Moved, at: Mapping[str, int], activation: int) -> Iterator[Sent]:
    """Hidden states to the next stage, and their gradients to the one before, for each micro-batch (Narayanan et al. 2019)."""
    messages = ((at["pp"] > 0) + (at["pp"] < cut.mesh["pp"] - 1)) * moved.micro_batches
    yield Sent("pp", "send", messages * moved.tokens * moved.width * activation, messages, waits=True)
