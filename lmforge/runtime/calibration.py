"""All that `lmforge calibrate` measures, in rounds: kernels, then steps of a small Llama through the project's own training loop, then kernels again."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lmforge.hardware.calibration import FORMAT, Attention, Calibration
from lmforge.hardware.nodes import Machine
from lmforge.predict.job import Job
from lmforge.predict.time import seconds
from lmforge.runtime.learned import correction
from lmforge.runtime.measure import Kernels, kernels, loader
from lmforge.runtime.measure_links import all_reduce
from lmforge.runtime.measure_step import Model, job, run, spread, write_tokens

CPU_STEP = Model(hidden=128, layers=4, heads=4, intermediate=384, vocab=2048, rows=4, length=256)
TINY = Model(hidden=16, layers=1, heads=1, intermediate=32, vocab=64, rows=1, length=16)  # whose steps are hardly more than the loop around them
GPU_STEP = Model(hidden=1024, layers=8, heads=8, intermediate=2816, vocab=32000, rows=4, length=2048)
STEPS = {"cpu": 16, "cuda": 30}
LEAST = 0.05  # of a residual: a step that was faster than its products alone was measured on a machine that changed


def measure(links: bool = True, output: str | Path | None = None) -> Calibration:
    """The calibration of the machine at hand, corrected by what finished runs in `output` took on it."""
    machine = here()
    device = torch.device("cuda", 0) if machine.accelerator == "cuda" else torch.device("cpu")
    model = GPU_STEP if device.type == "cuda" else CPU_STEP
    planned = job(model, STEPS[device.type], "bf16" if device.type == "cuda" else "fp32")
    with tempfile.TemporaryDirectory(prefix="lmforge-calibrate-") as folder:
        tokens = write_tokens(Path(folder) / "step", model.vocab, model.length, 2 * model.rows * model.length * STEPS[device.type])
        read = loader(tokens, model.length)
        before = kernels(device)
        steps = run(planned, tokens)
        loop, empty = _loop(Path(folder)) if device.type == "cpu" else (None, [])
        rates = _middle([before, kernels(device)])
    pair = all_reduce(device.type == "cuda") if links and (device.type == "cpu" or torch.cuda.device_count() > 1) else None
    found = Calibration(
        format=FORMAT,
        fingerprint=machine.fingerprint,
        name=machine.name,
        accelerator=machine.accelerator,
        threads=torch.get_num_threads(),
        devices=machine.devices,
        units=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None,
        torch=torch.__version__,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **dataclasses.asdict(rates) | {"attention": rates.attention},
        step=0.0,
        loader=read,
        bandwidth=pair[0] if pair else None,
        latency=pair[1] if pair else None,
        residual=1.0,
        noise=spread(steps),
        learned=1.0,
        learned_from=0,
    )
    if loop is not None:
        found = dataclasses.replace(found, step=max(0.0, statistics.median(empty) - _predicted(machine, found, loop)))
    found = dataclasses.replace(found, residual=residual(machine, found, planned, statistics.median(steps)))
    if output is None:
        return found
    ratio, count = correction(output, dataclasses.replace(machine, calibration=found))
    return dataclasses.replace(found, learned=ratio, learned_from=count)


def _loop(folder: Path) -> tuple[Job, list[float]]:
    """A stage with next to nothing to compute, and seconds of its steps."""
    planned = job(TINY, STEPS["cpu"], "fp32")
    return planned, run(planned, write_tokens(folder / "tiny", TINY.vocab, TINY.length, 10_000))


def here() -> Machine:
    """As `hardware=here` has it."""
    from lmforge.compose import App, experiment

    return experiment(App(["stage=pretrain", "hardware=here"]).compose()).hardware.machine()


def residual(machine: Machine, found: Calibration, planned: Job, measured: float) -> float:
    """How much longer than by these rates a real step's attention, elementwise kernels, loss and launches took, its products and update taken as predicted."""
    once, twice = (_predicted(machine, dataclasses.replace(found, residual=one), planned) for one in (1.0, 2.0))
    return max(LEAST, 1.0 + (measured - once) / (twice - once))


def _predicted(machine: Machine, found: Calibration, planned: Job) -> float:
    taken = seconds(planned, dataclasses.replace(machine, calibration=found))
    assert taken is not None
    return taken.total


def _middle(rounds: Sequence[Kernels]) -> Kernels:
    """The mean of each rate over the rounds."""
    first = rounds[0]

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values)

    def scores(dtype: str) -> Attention:
        fields = [field.name for field in dataclasses.fields(Attention)]
        return Attention(**{name: mean([getattr(one.attention[dtype], name) for one in rounds]) for name in fields})

    return Kernels(
        matmul={dtype: mean([one.matmul[dtype] for one in rounds]) for dtype in first.matmul},
        attention={dtype: scores(dtype) for dtype in first.attention},
        **{name: mean([getattr(one, name) for one in rounds]) for name in ("memory", "update", "launch")},
    )
