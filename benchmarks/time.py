"""How right predicted times are: llm-foundry's A100 rows with each row left out of the fit, and steps on this machine after a calibration.

`--cells nano,50M` measures only those; `--table` only the rows, which needs no torch. The rows are read from ../shared/data and left out where it is absent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import published
from lmforge.predict import flops

# hidden, layers, heads, intermediate, vocabulary, rows, length: models of 0.4M to 62M parameters
CELLS = {
    "nano": (64, 4, 2, 176, 2048, 8, 256),
    "1M": (128, 4, 4, 512, 2048, 8, 256),
    "3M": (192, 6, 6, 512, 4096, 4, 256),
    "7M": (256, 6, 8, 1024, 4096, 8, 128),
    "13M": (384, 6, 6, 1024, 8192, 4, 256),
    "20M": (384, 8, 6, 1536, 8192, 2, 512),
    "25M": (512, 6, 8, 1536, 8192, 4, 128),
    "50M": (640, 8, 10, 1792, 16384, 2, 128),
}
STEPS = 10  # measured in a run of a cell, the first two aside
RUNS = 2  # of each cell, apart from each other: what they differ by is noise too
ENOUGH = 0.10


def table() -> dict[str, Any]:
    """llm-foundry: its MFU from tokens/s, and the errors of a step's seconds with rows left out of the fit."""
    if not (published.DATA / published.TABLE).is_file():
        return {"llm_foundry": f"no {published.TABLE} in {published.DATA}"}
    rows = published.rows()
    worst = max(abs(mfu(row) - row.mfu) for row in rows)
    groups: dict[str, Sequence[object]] = {"row": range(len(rows)), "size": [row.model for row in rows], "length": [row.run.length for row in rows]}
    errors = {name: [abs(one) for one in published.left_out(rows, group)] for name, group in groups.items()}
    plain = [abs(one) for one in published.one_constant(rows)]
    found: dict[str, Any] = {
        f"leave_one_{name}_out": {"mean": percent(statistics.fmean(one)), "median": percent(statistics.median(one)), "worst": percent(max(one))}
        for name, one in errors.items()
    }
    return {"llm_foundry": {"rows": len(rows), "mfu_worst_points": round(worst, 4), "one_constant_mfu": percent(statistics.fmean(plain)), **found}}


def mfu(row: published.Row) -> float:
    """Percent, by llm-foundry's convention."""
    per_token = flops.full_square(row.params, row.shape.layers, row.shape.hidden, row.run.length)
    return 100 * flops.utilization(per_token, row.tokens_per_s, row.devices, published.PEAK)


def cells(names: Sequence[str]) -> dict[str, Any]:
    """Measured beside predicted seconds of real steps through the project's own loop, in float32."""
    from lmforge.predict.time import seconds
    from lmforge.runtime import calibration
    from lmforge.runtime.measure_step import Model, job, run, write_tokens

    known = calibration.measure(links=False)
    machine = dataclasses.replace(calibration.here(), calibration=known)
    measured: dict[str, list[list[float]]] = {name: [] for name in names}
    jobs = {name: job(Model(*CELLS[name]), STEPS + 2, "fp32") for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(RUNS):
            for name in names:
                *_, vocab, rows, length = CELLS[name]
                tokens = Path(folder) / f"{vocab}-{length}"
                if not tokens.exists():
                    write_tokens(tokens, vocab, length, 2 * rows * length * (STEPS + 2))
                measured[name].append(run(jobs[name], tokens))
    lines, errors, noises = {}, [], []
    for name in names:
        took = statistics.median(one for each in measured[name] for one in each)
        ends = [statistics.median(each) for each in measured[name]]
        noise = (max(ends) - min(ends)) / took
        predicted = seconds(jobs[name], machine)
        assert predicted is not None
        errors.append(abs(predicted.total / took - 1))
        noises.append(noise)
        lines[name] = {
            "measured_ms": round(1e3 * took, 2), "predicted_ms": round(1e3 * predicted.total, 2), "error": percent(predicted.total / took - 1),
            "noise": percent(noise), "within_band": predicted.low <= took <= predicted.high,
            "parts": {part: percent(value / predicted.total) for part, value in predicted.parts.items()},
        }  # fmt: skip
    allowed = max(ENOUGH, 2 * statistics.fmean(noises))
    summary = {"mean_error": percent(statistics.fmean(errors)), "allowed": percent(allowed), "threads": known.threads, "load": round(os.getloadavg()[0], 1)}
    return {"here": {"machine": known.name, **summary, "cells": lines}}


def percent(share: float) -> str:
    """As people read it."""
    return f"{100 * share:.1f} %"


def main(argv: Sequence[str]) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    found = table() | ({} if args.table else cells(args.cells.split(",")))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
