"""llm-foundry's measured rows and what the model of time makes of them, with its few factors fitted to the other rows."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmforge.compose import App, experiment
from lmforge.hardware.nodes import Machine
from lmforge.parallel.layout import ONE
from lmforge.predict.job import Shape
from lmforge.predict.kernels import Moved, Seconds
from lmforge.predict.layers import Run, micro_batch
from lmforge.predict.links import beside, collective, group
from lmforge.predict.rates import rates

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TABLE = "llm_foundry_mfu_a100_80gb.csv"
# d_model, layers, heads of MPT (llm-foundry's scripts/train/yamls/pretrain).
MPT = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32),
    "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64),
}  # fmt: skip
VOCABULARY = 50368
PEAK = 312e12
COMPOSER_UPDATE = 100  # bytes an element of Composer's DecoupledAdamW with its clipping, not fused
LOSS = 6  # bytes a logit of its fused cross entropy
FACTORS, START = ("matmul", "attention", "exposed"), (0.80, 0.42, 0.80)


@dataclass(frozen=True)
class Row:
    """One measured training configuration: FSDP with bf16 gathers and sums."""

    model: str
    shape: Shape
    run: Run
    accumulation: int
    devices: int
    reshards: bool
    params: int
    tokens_per_s: float  # printed as int(), so half a token more
    mfu: float  # percent
    hfu: float

    @property
    def seconds(self) -> float:
        return self.run.tokens * self.accumulation * self.devices / self.tokens_per_s


def rows(folder: Path = DATA) -> list[Row]:
    """The table's rows."""
    with (folder / TABLE).open() as file:
        return [_row(one) for one in csv.DictReader(file)]


def _row(one: dict[str, str]) -> Row:
    hidden, layers, heads = MPT[one["Model"]]
    length, devices, micro = int(one["SeqLen (T)"]), int(one["# GPUs"]), int(one["MicroBatchSize"])
    shape = Shape(
        family="mpt", kind="gpt2", hidden=hidden, layers=layers, heads=heads, kv_heads=heads, head_dim=hidden // heads, intermediate=4 * hidden,
        vocab=VOCABULARY, tied=True, learned_positions=length, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, rotary_dim=0, dropout=0.0,
    )  # fmt: skip
    run = Run(
        rows=micro, length=length, width=2, stream=2, chain=_chain(hidden),
        checkpointing="full" if one["Activation Checkpointing"] == "True" else "none",
        early_stop=one["MP Mode"] != "PURE",  # those rows are older than torch 2.1
    )  # fmt: skip
    return Row(
        one["Model"], shape, run, max(1, round(int(one["GlobalBatchSize"]) / devices / micro)), devices, one["Sharding Strategy"] == "FULL_SHARD",
        int(one["NumParams"]), int(one["Throughput (T/s)"]) + 0.5, float(one["MFU"]), float(one["HFU"]),
    )  # fmt: skip


def _chain(hidden: int) -> Moved:
    """Bytes a token of an MPT layer's kernels that are no products: low-precision LayerNorms, biases, GELU, two sums."""
    inner = 4 * hidden
    return Moved(Seconds(2 * (15 * hidden + 2 * inner), 2 * (26 * hidden + 4 * inner)), Seconds(0.0, 0.0))


@functools.cache
def a100() -> Machine:
    """conf/hardware/a100x8.yaml."""
    return experiment(App(["hardware=a100x8", "stage=pretrain"]).compose()).hardware.machine()


def predicted(row: Row, factors: Sequence[float]) -> float:
    """Seconds of a step: the kernels, links and update that `lmforge.predict.time` adds up, for Composer's loop."""
    machine = dataclasses.replace(a100(), factors=dataclasses.replace(a100().factors, **dict(zip(FACTORS, factors, strict=True))))
    found = rates(machine, "bfloat16", row.devices)
    logits = row.run.tokens * VOCABULARY
    loss = Seconds(LOSS * logits / found.memory, 0.0)
    compute = row.accumulation * sum(micro_batch(row.shape, row.run, found, layers=row.shape.layers, head_tokens=row.run.tokens, loss=loss).values())
    ranks = group("dp_shard", ONE | {"dp_shard": row.devices}, found)
    times = row.accumulation * (3 if row.reshards else 2)
    sent = times * 2 * row.params * (row.devices - 1) / row.devices
    traffic = collective("all_gather", sent, times * row.shape.layers, ranks)
    return compute + beside(traffic, compute, found.exposed) + row.params / row.devices * COMPOSER_UPDATE / found.memory


def left_out(table: Sequence[Row], groups: Sequence[object]) -> list[float]:
    """Relative errors of rows predicted with factors fitted to the rows of all other groups."""
    start = fit(lambda factors: [predicted(row, factors) for row in table], [row.seconds for row in table], START)
    errors = [0.0] * len(table)
    for each in dict.fromkeys(groups):
        keep = [row for row, own in zip(table, groups, strict=True) if own != each]
        found = fit(lambda factors, keep=keep: [predicted(row, factors) for row in keep], [row.seconds for row in keep], start)  # type: ignore[misc]
        for index, row in enumerate(table):
            if groups[index] == each:
                errors[index] = predicted(row, found) / row.seconds - 1
    return errors


def one_constant(table: Sequence[Row]) -> list[float]:
    """Errors of the plainest predictor: the median MFU of the other rows."""
    errors = []
    for index, row in enumerate(table):
        others = sorted(other.mfu for place, other in enumerate(table) if place != index)
        middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
        errors.append(row.mfu / middle - 1)
    return errors


def fit(
    predict: Callable[[Sequence[float]], Sequence[float]], measured: Sequence[float], start: Sequence[float], *, low: float = 0.02, high: float = 1.5,
    scale: float = 0.03, rounds: int = 12,
) -> list[float]:  # fmt: skip
    """Positive factors at which predict(factors) is nearest to `measured`: Gauss-Newton on log seconds and log factors.

    Rows are weighted as a soft l1 loss does it (Charbonnier; scale 0.03), so that a row that nothing explains does not move the rest.
    """
    at, goals = [math.log(one) for one in start], [math.log(one) for one in measured]

    def residuals(point: Sequence[float]) -> list[float]:
        found = predict([math.exp(value) for value in point])
        return [math.log(one) - goal for one, goal in zip(found, goals, strict=True)]

    def loss(found: Sequence[float]) -> float:
        return sum(math.sqrt(1 + (one / scale) ** 2) - 1 for one in found)

    here = residuals(at)
    for _ in range(rounds):
        moved = [residuals([value + (1e-4 if other == index else 0.0) for other, value in enumerate(at)]) for index in range(len(at))]
        columns = [[(one - base) / 1e-4 for one, base in zip(column, here, strict=True)] for column in moved]
        step = _newton(columns, here, [1 / math.sqrt(1 + (one / scale) ** 2) for one in here])
        for shrink in (1.0, 0.5, 0.25, 0.1, 0.02):
            point = [min(max(value + shrink * move, math.log(low)), math.log(high)) for value, move in zip(at, step, strict=True)]
            found = residuals(point)
            if loss(found) < loss(here) - 1e-9:
                at, here = point, found
                break
        else:
            break
    return [math.exp(value) for value in at]


def _newton(columns: Sequence[Sequence[float]], residuals: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The weighted least-squares step, by elimination with pivots."""

    def dot(left: Sequence[float], right: Sequence[float]) -> float:
        return sum(weight * a * b for weight, a, b in zip(weights, left, right, strict=True))

    rows = [[*(dot(left, right) + (1e-9 if left is right else 0.0) for right in columns), -dot(left, residuals)] for left in columns]
    for index in range(len(rows)):
        pivot = max(range(index, len(rows)), key=lambda other: abs(rows[other][index]))
        rows[index], rows[pivot] = rows[pivot], rows[index]
        for other in range(len(rows)):
            if other != index:
                factor = rows[other][index] / rows[index][index]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[index], strict=True)]
    return [row[-1] / row[index] for index, row in enumerate(rows)]
