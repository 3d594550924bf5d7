"""What runs with what: the combinations that do not, as data. A combination that no line refuses is run by tests/parallel/test_cells.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmforge.errors import Problem
from lmforge.model.weights import sizes, splits
from lmforge.parallel.nodes import Parallel
from lmforge.registry import types
from lmforge.stage.base import TrainingStage

WAYS = ("single", "ddp", "fsdp", "tp", "pp", "cp", "deepspeed")  # how ranks may share the work; a mesh may be several at once
ROLLOUTS = ("ppo", "grpo")
PAIRS = ("dpo", "ipo", "hinge", "orpo", "simpo", "kto", "reward")


@dataclass(frozen=True)
class No:
    """`values` of a kind (stage, adapter, precision, optimizer, guard) do not run in any of `ways`."""

    kind: str
    values: tuple[str, ...]
    ways: tuple[str, ...]
    why: str
    instead: str


NOES = (
    No("stage", ("*",), ("cp",), "torch splits a sequence for its CUDA attention only, which knows no documents within a row", "type parallel.cp=1"),
    No("stage", ROLLOUTS, ("tp", "pp", "deepspeed"), "answers are drawn from layers that are whole when they run", "type parallel=fsdp or ddp"),
    No("stage", PAIRS, ("pp",), "its rows differ in length, and stages of a pipeline hand on tensors of one shape", "type parallel=fsdp or tp"),
    No("adapter", ("lora", "dora", "qlora", "prompt_tuning"), ("tp", "pp"), "an adapter is not split with the model", "type parallel=fsdp or ddp"),
    No("adapter", ("qlora",), ("deepspeed",), "nobody has tested 4-bit weights there", "type parallel=fsdp or ddp, or adapter=lora"),
    No("precision", ("fp16",), ("tp", "pp", "deepspeed"), "a loss scale is not shared over these ranks", "type precision=bf16, or parallel=fsdp or ddp"),
    No("precision", ("bfloat16 weights",), ("deepspeed",), "DeepSpeed keeps weights in float32 here", "type parallel=fsdp"),
    No("optimizer", ("muon",), ("deepspeed",), "DeepSpeed flattens matrices, and takes one optimizer", "type parallel=fsdp"),
    No("optimizer", ("adafactor",), ("fsdp", "tp", "deepspeed"), "its row and column sums need whole matrices", "type optimizer=adamw, or parallel=ddp"),
    No("optimizer", ("adamw_8bit",), ("fsdp", "tp", "pp", "deepspeed"), "bitsandbytes' blocks are not sharded", "type optimizer=adamw, or parallel=ddp"),
    No("guard", ("optimizer.max_skips > 0",), ("deepspeed",), "DeepSpeed knows a norm once it has stepped", "type optimizer.max_skips=0, or parallel=fsdp"),
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
        yield "guard", "optimizer.max_skips > 0"


def refused(kind: str, value: str, used: Sequence[str]) -> No | None:
    """The first line that refuses a value in these ways."""
    return next((no for no in NOES if no.kind == kind and {value, "*"} & set(no.values) and set(used) & set(no.ways)), None)


def problems(stage: TrainingStage, config: Mapping[str, Any], mesh: Mapping[str, int], where: str) -> Iterator[Problem]:
    """Why a stage of this model does not run on this mesh."""
    used = ways(stage.parallel, mesh)
    for kind, value in features(stage):
        if no := refused(kind, value, used):
            way = next(one for one in used if one in no.ways)
            yield Problem(f"{where}.parallel", f"{value if kind == 'guard' else f'{kind}={value}'} does not run with {way}: {no.why}", no.instead)
    yield from _tensor(config, mesh["tp"], where)
    yield from _pipeline(config, mesh["pp"], where)
    if config.get("attention_dropout") and {"tp", "pp"} & set(used):
        what = "ranks that share a layer, or a pipeline that goes on from a state, would drop other attention than one rank does"
        yield Problem(f"{where}.parallel", what, "type parallel=fsdp, or a model without dropout")
    if used == ("single",) and stage.parallel.offloads("params"):
        yield Problem(f"{where}.parallel.cpu_offload", "one device alone has nobody to shard with, so nothing is offloaded", "type two devices or more")


def _tensor(config: Mapping[str, Any], tp: int, where: str) -> Iterator[Problem]:
    """Heads and hidden units are split evenly."""
    if tp == 1:
        return
    shape, plan = sizes(config), splits(config)
    if not plan:
        yield Problem(f"{where}.parallel.tp", f"nobody has tested how matrices of a {config.get('model_type')} split", "type parallel.tp=1, or parallel=fsdp")
        return
    heads = "column" in {style for name, style in plan.items() if name.endswith("q_proj")}
    counted = {"num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads} if heads else {}
    for key, count in {**counted, "intermediate_size": shape.intermediate_size}.items():
        if count % tp:
            near = [one for one in range(2, count + 1) if count % one == 0 and all(other % one == 0 for other in counted.values())]
            yield Problem(f"{where}.parallel.tp", f"{key} {count} is not divisible by tp {tp}", f"type parallel.tp={_near(near, tp)}")


def _pipeline(config: Mapping[str, Any], pp: int, where: str) -> Iterator[Problem]:
    """Stages hold whole layers, and no weight twice."""
    if pp == 1:
        return
    shape = sizes(config)
    if not splits(config):
        yield Problem(f"{where}.parallel.pp", f"nobody has tested how a {config.get('model_type')} is cut into stages", "type parallel.pp=1, or parallel=fsdp")
    elif shape.num_hidden_layers < pp:
        yield Problem(f"{where}.parallel.pp", f"{shape.num_hidden_layers} layers are fewer than {pp} stages", f"type parallel.pp={shape.num_hidden_layers}")
    elif shape.tie_word_embeddings:
        what = "the head is the embedding, and they lie in different stages"
        yield Problem(f"{where}.parallel.pp", what, "type model.tie_word_embeddings=false, or parallel=fsdp")


def _near(divisors: Sequence[int], tp: int) -> int:
    return min(divisors, key=lambda one: (abs(one - tp), one)) if divisors else 1


def table() -> Iterator[tuple[str, ...]]:
    """The matrix for people: a header, then a row per value of each kind, and which ways run it."""
    yield ("", *WAYS)
    kinds = {
        "stage": [name for name, cls in sorted(types("stage").items()) if issubclass(cls, TrainingStage)],
        "adapter": sorted(types("adapter")),
        "precision": ["fp32", "bf16", "fp16", "bfloat16 weights"],
        "optimizer": sorted(types("optimizer")),
    }
    for kind, values in kinds.items():
        for value in values:
            refusals = (refused("stage", "*", (way,)) or refused(kind, value, (way,)) for way in WAYS)
            yield (f"{kind}={value}", *("no" if no else "yes" for no in refusals))
