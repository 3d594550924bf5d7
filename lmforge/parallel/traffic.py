"""What a device sends in an optimizer step, in bytes, by collective; it receives as much.

Collectives are counted as rings run them (Rajbhandari et al. 2020, ZeRO, section 7): over n ranks a device sends n - 1 of n parts in an all-gather or a
reduce-scatter, and twice that in an all-reduce. A step is the forward and backward passes of its micro-batches at full length; rollouts, norms, metrics
and states come on top. What each engine moves is said where it is counted, and held against the collectives that torch issues in tests/parallel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmforge.parallel.shards import Cut, Sized

Traffic = Mapping[str, int]  # all_gather, reduce_scatter, all_reduce, send -> bytes


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


def copies(ranks: int, moved: Moved) -> Traffic:
    """DDP: one all-reduce of all gradients a step (Li et al. 2020)."""
    return {"all_reduce": all_reduce(ranks, elements(moved.trained) * moved.reduce_bytes)}


def zero(stage: int, ranks: int, moved: Moved) -> Traffic:
    """ZeRO (Rajbhandari et al. 2020, section 7): stages 1 and 2 sum gradients to their owners and gather the new weights once a step.

    Stage 2 sums them after every micro-batch, and stage 3 too, which gathers weights in every forward and every backward instead: in the dtype of matrix
    products where gradients are summed in that too, for DeepSpeed has one for both.
    """
    share, all_of_it = -(-elements(moved.trained) // ranks), -(-elements((*moved.trained, *moved.base)) // ranks)
    gathered = 2 * moved.micro_batches * all_of_it * max(moved.compute_bytes, moved.reduce_bytes) if stage == 3 else share * moved.param_bytes
    summed = share * moved.reduce_bytes * (moved.micro_batches if stage > 1 else 1)
    return {"all_gather": exchanged(ranks, gathered), "reduce_scatter": exchanged(ranks, summed)}


def mesh(cut: Cut, moved: Moved, *, reshards: bool) -> Traffic:
    """A mesh, on a device of the pipeline stage that sends most. `reshards`: FSDP2 frees gathered weights after forward."""
    sharded = cut.mesh["dp_replicate"] * cut.mesh["dp_shard"] > 1
    # FSDP2 hands out weights in the dtype of matrix products, so that all activations have it; under autocast alone most have that of the weights.
    activation = moved.compute_bytes if sharded else moved.param_bytes
    found: list[Counter[str]] = []
    for at in cut.first_ranks():
        sent: Counter[str] = Counter()
        for kind, size in (*_sharding(cut, moved, at, reshards), *_tensor(cut, moved, at, activation), *_pipeline(cut, moved, at, activation)):
            sent[kind] += size
        found.append(sent)
    return {kind: size for kind, size in max(found, key=lambda one: one.total()).items() if size}


def _sharding(cut: Cut, moved: Moved, at: Mapping[str, int], reshards: bool) -> Iterator[tuple[str, int]]:
    """FSDP2 and HSDP (Zhao et al. 2023).

    Weights are gathered for every forward, and again for every backward where they are freed between. Gradients go to their owners after every
    micro-batch, and once a step between copies. A pipeline has several micro-batches on their way, so where weights are not freed they stay through a step.
    """
    ranks, replicas, pipelined = cut.mesh["dp_shard"], cut.mesh["dp_replicate"], cut.mesh["pp"] > 1
    trained = sum(one.numel for one in cut.held_at(moved.trained, at))
    everything = trained + sum(one.numel for one in cut.held_at(moved.base, at))
    gathers = 1 if pipelined and not reshards else moved.micro_batches * (1 + reshards)
    yield "all_gather", gathers * exchanged(ranks, everything * moved.compute_bytes)
    yield "reduce_scatter", moved.micro_batches * exchanged(ranks, trained * moved.reduce_bytes)
    yield "all_reduce", all_reduce(replicas, trained * moved.reduce_bytes)


def _tensor(cut: Cut, moved: Moved, at: Mapping[str, int], activation: int) -> Iterator[tuple[str, int]]:
    """Activations between tensor-parallel ranks, by how each matrix is split (engine/tensor.py).

    Megatron (Narayanan et al. 2021, section 3.2) has two all-reduces of a layer in forward and two in backward. Here forward is the same; in
    backward each matrix that is split by outputs sums the gradient of its input by itself, so a layer of Llama's has five. Recomputing repeats what
    forward does, up to the last thing that backward needs: the sum at the end of a layer only where a norm takes it.
    """
    ranks = cut.mesh["tp"]
    if ranks == 1:
        return
    ends_in_norm = any(".post_feedforward_layernorm." in one.name for one in moved.trained)
    for module, shape, layers in _split(cut, moved.trained, at):
        style, times = cut.splits[module], layers * moved.micro_batches * moved.tokens
        again = moved.recomputes and "{layer}" in module and (ends_in_norm or not module.endswith(".mlp.down_proj"))
        forward = 1 + again
        if style in ("row", "row_from_whole"):
            yield "all_reduce", all_reduce(ranks, forward * times * shape[0] * moved.compute_bytes)
        if style == "row_from_whole":
            yield "all_gather", exchanged(ranks, times * -(-shape[1] // ranks) * moved.compute_bytes)
        if style == "vocabulary":
            yield "all_reduce", all_reduce(ranks, times * shape[1] * activation)
        if style in ("column", "column_gathered"):
            yield "all_reduce", all_reduce(ranks, times * shape[1] * activation)
        if style == "column_gathered":
            yield "all_gather", exchanged(ranks, forward * times * -(-shape[0] // ranks) * moved.compute_bytes)


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


def _pipeline(cut: Cut, moved: Moved, at: Mapping[str, int], activation: int) -> Iterator[tuple[str, int]]:
    """Hidden states to the next stage, and their gradients to the one before, for each micro-batch (Narayanan et al. 2019)."""
    neighbours = (at["pp"] > 0) + (at["pp"] < cut.mesh["pp"] - 1)
    yield "send", neighbours * moved.micro_batches * moved.tokens * moved.width * activation
