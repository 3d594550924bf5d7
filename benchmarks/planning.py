"""What planning costs: a cold `plan` beside a bare Hydra compose of the same tree, a hundred variants in one process, more steps, larger models, more devices.

CPU time throughout (user and system), medians of repeats that take turns. Both cold commands find their bytecode compiled, as an installed package does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["stage=dpo", "model=7b", "parallel=fsdp", "hardware=h100x8"]
PLAN = [sys.executable, "-m", "lmforge", "plan", *WORDS]
BARE = [
    sys.executable,
    "-c",
    f"from hydra import compose, initialize_config_dir\nwith initialize_config_dir({str(ROOT / 'conf')!r}, version_base='1.3'):\n"
    f" compose('config', overrides={WORDS!r})",
]
MODELS = ("nano", "micro", "400m", "1b", "7b", "13b", "70b", "gpt3_175b")
DEVICES = (1, 8, 64, 512, 1024)
STAGES = (4, 8, 16, 32, 64)


def cold(pairs: int) -> dict[str, Any]:
    """Seconds and peak memory of both commands, process by process in turn."""
    with tempfile.TemporaryDirectory() as cwd:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": f"{cwd}/bytecode", "PYTHONPATH": str(ROOT)}
        for command in (PLAN, BARE):
            process(command, cwd, env)
        measured = [(process(PLAN, cwd, env), process(BARE, cwd, env)) for _ in range(pairs)]
    return {
        "plan_cpu_s": round(statistics.median(plan[0] for plan, _ in measured), 3),
        "bare_hydra_compose_cpu_s": round(statistics.median(bare[0] for _, bare in measured), 3),
        "ratio": round(statistics.median(plan[0] / bare[0] for plan, bare in measured), 2),
        "plan_peak_mb": round(max(plan[1] for plan, _ in measured), 1),
        "bare_peak_mb": round(max(bare[1] for _, bare in measured), 1),
        "pairs": pairs,
    }


def process(command: Sequence[str], cwd: str, env: dict[str, str]) -> tuple[float, float]:
    """CPU seconds and the peak resident memory, in millions of bytes, of one process."""
    running = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def variants(count: int) -> dict[str, Any]:
    """Milliseconds of `count` variants in learning rate, budget and model, each composed and compiled; the first ones read the files."""
    taken: dict[str, list[float]] = {"compose": [], "experiment": [], "compile": []}
    for number in range(count):
        lr, steps, model = 1e-5 * (number + 1), 100 + number, MODELS[number % 5]
        words = ["stage=pretrain", f"model={model}", f"optimizer.lr={lr:.6g}", f"stage.pretrain.budget.steps={steps}", "parallel=fsdp", "hardware=h100x8"]
        start = time.process_time()
        composed = App(words).compose()
        read = time.process_time()
        said = experiment(composed)
        decoded = time.process_time()
        compile(said)
        for name, seconds in zip(taken, (read - start, decoded - read, time.process_time() - decoded), strict=True):
            taken[name].append(1000 * seconds)
    whole = [sum(one) for one in zip(*taken.values(), strict=True)]
    return {
        "count": count,
        "median_ms": round(statistics.median(whole), 2),
        "mean_ms": round(statistics.mean(whole), 2),
        "worst_ms": round(max(whole), 1),
        "medians_ms": {name: round(statistics.median(one), 2) for name, one in taken.items()},
        "means_ms": {name: round(statistics.mean(one), 2) for name, one in taken.items()},
    }


def compiled(cells: dict[str, Experiment], repeats: int) -> dict[str, float]:
    """Median milliseconds of `compile` for each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in cells}
    for name, said in itertools.chain.from_iterable([cells.items()] * repeats):
        start = time.process_time()
        compile(said)
        taken[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(one), 2) for name, one in taken.items()}


def read(*words: str, folder: str | None = None) -> Experiment:
    return experiment(App(list(words), folder).compose())


def by_model(repeats: int) -> dict[str, float]:
    fixed = ("stage=pretrain", "eval=none", "parallel=fsdp", "hardware=h100x1024", "optimizer.global_batch_tokens=4194304")
    return compiled({model: read(*fixed, f"model={model}") for model in MODELS}, repeats)


def by_devices(repeats: int) -> dict[str, float]:
    fixed = ("stage=pretrain", "parallel=fsdp", "hardware=h100x1024", "model=1b", "optimizer.global_batch_tokens=4194304")
    return compiled({str(count): read(*fixed, f"parallel.devices={count}") for count in DEVICES}, repeats)


def by_steps(repeats: int) -> dict[str, float]:
    """Milliseconds a step of plans with ever more stages after one another."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "experiment").mkdir()
        for count in STAGES:
            stages = "\n".join(f"  - /stage@stage.sft{number}: sft" for number in range(count))
            text = f"# @package _global_\ndefaults:\n{stages}\n"
            (Path(folder) / "experiment" / f"sft_{count}.yaml").write_text(text)
        cells = {str(count): read(f"experiment=sft_{count}", "model=1b", "hardware=h100x8", "parallel=fsdp", folder=folder) for count in STAGES}
    steps = {name: len(compile(said).steps) for name, said in cells.items()}
    return {str(steps[name]): round(taken / steps[name], 3) for name, taken in compiled(cells, repeats).items()}


def spread(found: dict[str, float]) -> float:
    """The largest over the smallest."""
    return round(max(found.values()) / min(found.values()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="cold processes of each kind")
    parser.add_argument("--repeats", type=int, default=15, help="compilations of each plan")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/planning.json")
    given = parser.parse_args()
    found: dict[str, Any] = {"cold": cold(given.pairs), "variants": variants(100)}
    grown: dict[str, Callable[[int], dict[str, float]]] = {"ms_by_model": by_model, "ms_by_devices": by_devices, "ms_a_step_by_steps": by_steps}
    for name, measure in grown.items():
        cells = measure(given.repeats)
        found[name] = {"cells": cells, "largest_over_smallest": spread(cells)}
    found["this_process_peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)
    for name, one in found.items():
        print(f"{name}: {json.dumps(one)}")
    if given.write:
        (ROOT / "benchmarks" / "results" / "planning.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
