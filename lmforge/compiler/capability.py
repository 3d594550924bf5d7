"""What runs with what: the combinations that do not, as data. A combination that no line refuses is run by tests/parallel/test_cells.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmforge.errors import Problem
from lmforge.model.weights import sizes, splits
from lmforge.parallel.layout import AXES
from lmforge.parallel.nodes import Mesh, Parallel
from lmforge.registry import types
from lmforge.stage.base import TrainingStage

WAYS = ("single", "ddp", "fsdp", "tp", "pp", "cp", "deepspeed")  # how ranks may share the work; a mesh may be several at once
ROLLOUTS = ("ppo", "grpo")
PAIRS = ("dpo", "ipo", "hinge", "orpo", "simpo", "kto", "reward")

GUARD = "optimizer.max_skips>0"  # which optimizer.skip_sigma needs


@dataclass(frozen=True)
class No:
    """`values` of a kind (stage, adapter, precision, optimizer, guard) do not run in any of `ways`."""

    kind: str
    values: tuple[str, ...]
    ways: tuple[str, ...]
    why: str
    instead: tuple[str, ...]  # what to type, the nearest first; where axes are typed one by one, those that are refused go, and no strategy


NOES = (
    No("stage", ("*",), ("cp",), "torch splits a sequence for its CUDA attention only, which knows no documents within a row", ("parallel=fsdp",)),
    No("stage", ROLLOUTS, ("tp", "pp", "deepspeed"), "answers are drawn from layers that are whole when they run", ("parallel=fsdp",)),
    No("stage", PAIRS, ("pp",), "its rows differ in length, and stages of a pipeline hand on tensors of one shape", ("parallel=fsdp",)),
    No("adapter", ("lora", "dora", "qlora", "prompt_tuning"), ("tp", "pp"), "an adapter is not split with the model", ("parallel=fsdp",)),
    No("adapter", ("qlora",), ("deepspeed",), "nobody has tested 4-bit weights there", ("parallel=fsdp", "adapter=lora")),
    No("precision", ("fp16",), ("tp", "pp", "deepspeed"), "a loss scale is not shared over these ranks", ("precision=bf16", "parallel=fsdp")),
    No("precision", ("bfloat16 weights",), ("deepspeed",), "DeepSpeed keeps weights in float32 here", ("precision.param_dtype=float32", "parallel=fsdp")),
    No("optimizer", ("muon",), ("deepspeed",), "DeepSpeed flattens matrices, and takes one optimizer", ("parallel=fsdp",)),
    No("optimizer", ("adafactor",), ("fsdp", "tp", "deepspeed"), "its row and column sums need whole matrices", ("optimizer=adamw", "parallel=ddp")),
    No("optimizer", ("adamw_8bit",), ("fsdp", "tp", "pp", "deepspeed"), "bitsandbytes' blocks are not sharded", ("optimizer=adamw", "parallel=ddp")),
    No("guard", (GUARD,), ("deepspeed",), "DeepSpeed knows a norm once it has stepped", ("optimizer.max_skips=0", "parallel=fsdp")),
)


def ways(parallel: Parallel, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """How this mesh shares the work."""
    if parallel.type != "mesh":
        return (parallel.type,)
    found = [axis for axis in ("tp", "pp", "cp") if mesh[axis] > 1]
    return tuple(["fsdp"] * (mesh["dp_shard"] * mesh["dp_replicate"] > 1) + found) or ("single",)


def features(stage: TrainingStage) -> Iterator[tuple[str, str]]:
    """The values of each kind that a stage has."""
    yield "stage", stage.type
    if hasattr(stage, "adapter"):
        yield "adapter", stage.adapter.type
    yield "precision", {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[stage.precision.compute_dtype]
    if stage.precision.param_dtype == "bfloat16":
        yield "precision", "bfloat16 weights"
    yield "optimizer", stage.optimizer.type
    if stage.optimizer.max_skips:
        yield "guard", GUARD


def refused(kind: str, value: str, used: Sequence[str]) -> No | None:
    """The first line that refuses a value in these ways."""
    return next((no for no in NOES if no.kind == kind and {value, "*"} & set(no.values) and set(used) & set(no.ways)), None)


def problems(stage: TrainingStage, config: Mapping[str, Any], mesh: Mapping[str, int], where: str) -> Iterator[Problem]:
    """Why a stage of this model does not run on this mesh."""
    used, parallel = ways(stage.parallel, mesh), stage.parallel
    for kind, value in features(stage):
        if no := refused(kind, value, used):
            bad = [one for one in used if one in no.ways]
            what = f"{value if kind == 'guard' else f'{kind}={value}'} does not run with {bad[0]}: {no.why}"
            yield Problem(f"{where}.parallel", what, _typed(no, parallel, bad))
    if isinstance(parallel, Mesh):
        yield from _tensor(config, parallel, mesh, where)
        yield from _pipeline(stage, config, mesh, where)
        if config.get("attention_dropout") and (bad := [axis for axis in ("tp", "pp") if mesh[axis] > 1]):
            what = "ranks that share a layer, or a pipeline that goes on from a state, would drop other attention than one rank does"
            yield Problem(f"{where}.parallel", what, f"type {resized(parallel, dict.fromkeys(bad, 1))}, or take a model without dropout")
        if used == ("single",) and parallel.offloads("params"):
            what = "one device alone has nobody to shard with, so nothing is offloaded"
            yield Problem(f"{where}.parallel.cpu_offload", what, "type parallel.cpu_offload=false")


def _typed(no: No, parallel: Parallel, bad: Sequence[str]) -> str:
    """A line's way out for this strategy, of which `bad` is refused."""
    axes = [way for way in bad if way in AXES]
    if not isinstance(parallel, Mesh) or not axes:
        return f"type {' or '.join(no.instead)}"
    found = [one for one in no.instead if not one.startswith("parallel=")]
    if "fsdp" not in no.ways:  # which is what is left of a mesh
        found += [resized(parallel, dict.fromkeys(axes, 1))] * ("parallel=fsdp" in no.instead)
    return f"type {' or '.join(found)}"


def resized(parallel: Mesh, sizes: Mapping[str, int]) -> str:
    """What to type so that these axes of a mesh have these sizes; dp_shard takes what they leave."""
    if any(parallel.axes()[axis] is None for axis in sizes):  # parallel=tp or pp, or an axis that was left open
        return " ".join(["parallel=fsdp", *(f"parallel.{axis}={size}" for axis, size in sizes.items() if size > 1 or parallel.axes()[axis] is not None)])
    return " ".join([*(f"parallel.{axis}={size}" for axis, size in sizes.items()), *(["parallel.dp_shard=null"] if parallel.dp_shard is not None else [])])


def _nearest(parallel: Mesh, mesh: Mapping[str, int], axis: str, fits: Callable[[int], bool]) -> str:
    """What to type for the size of an axis that fits and is nearest, where dp_shard takes what is left of the devices."""
    room = mesh[axis] * mesh["dp_shard"]
    sizes = [size for size in range(1, room + 1) if room % size == 0 and fits(size)]
    return f"type {resized(parallel, {axis: min(sizes, key=lambda size: (abs(size - mesh[axis]), size))})}"


def _tensor(config: Mapping[str, Any], parallel: Mesh, mesh: Mapping[str, int], where: str) -> Iterator[Problem]:
    """Heads and hidden units are split evenly."""
    tp = mesh["tp"]
    if tp == 1:
        return
    shape, plan = sizes(config), splits(config)
    if not plan:
        what = f"nobody has tested how matrices of a {config.get('model_type')} split"
        yield Problem(f"{where}.parallel.tp", what, f"type {resized(parallel, {'tp': 1, **({'pp': 1} if mesh['pp'] > 1 else {})})}")
        return
    heads = "column" in {style for name, style in plan.items() if name.endswith("q_proj")}
    counted = {"num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads} if heads else {}
    counted["intermediate_size"] = shape.intermediate_size
    for key, count in counted.items():
        if count % tp:
            instead = _nearest(parallel, mesh, "tp", lambda size: not any(one % size for one in counted.values()))
            yield Problem(f"{where}.parallel.tp", f"{key} {count} is not divisible by tp {tp}", instead)


def _pipeline(stage: TrainingStage, config: Mapping[str, Any], mesh: Mapping[str, int], where: str) -> Iterator[Problem]:
    """Stages hold whole layers, and no weight twice."""
    pp, parallel = mesh["pp"], stage.parallel
    assert isinstance(parallel, Mesh)
    if pp == 1:
        return
    shape, without = sizes(config), resized(parallel, {"pp": 1})
    if not splits(config):
        if mesh["tp"] > 1:  # said of that axis
            return
        yield Problem(f"{where}.parallel.pp", f"nobody has tested how a {config.get('model_type')} is cut into stages", f"type {without}")
        return
    few, tied = shape.num_hidden_layers < pp, shape.tie_word_embeddings
    untied = "model.tie_word_embeddings=false" if hasattr(getattr(stage, "model", None), "tie_word_embeddings") else ""
    if few:
        instead = _nearest(parallel, mesh, "pp", lambda size: size <= shape.num_hidden_layers) if untied or not tied else f"type {without}"
        yield Problem(f"{where}.parallel.pp", f"{shape.num_hidden_layers} layers are fewer than {pp} stages", instead)
    if tied:
        either = untied if untied and few else f"{untied} or {without}" if untied else without
        yield Problem(f"{where}.parallel.pp", "the head is the embedding, and they lie in different stages", f"type {either}")


def table() -> Iterator[tuple[str, ...]]:
    """The matrix for people: a header, then a row per value of each kind, and which ways run it."""
    yield ("", *WAYS)
    kinds = {
        "stage": [name for name, cls in sorted(types("stage").items()) if issubclass(cls, TrainingStage)],
        "adapter": sorted(types("adapter")),
        "precision": ["fp32", "bf16", "fp16", "bfloat16 weights"],
        "optimizer": sorted(types("optimizer")),
        "guard": [GUARD],
    }
    for kind, values in kinds.items():
        for value in values:
            refusals = (refused("stage", "*", (way,)) or refused(kind, value, (way,)) for way in WAYS)
            yield (f"{kind}={value}", *("no" if no else "yes" for no in refusals))
