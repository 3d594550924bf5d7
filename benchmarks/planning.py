"""CPU time of a cold `plan` beside a bare Hydra compose of the same tree: pairs of processes, one after the other."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"
PLAN = [sys.executable, "-m", "lmforge", "plan", "stage=dpo", "model=7b", "parallel=fsdp", "hardware=h100x8"]
BARE = [
    sys.executable,
    "-c",
    f"from hydra import compose, initialize_config_dir\nwith initialize_config_dir({str(CONF)!r}, version_base='1.3'):\n"
    " compose('config', overrides=['stage=dpo', 'model=7b', 'parallel=fsdp', 'hardware=h100x8'])",
]


def cpu_seconds(command: list[str], cwd: str) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(pairs: int = 9) -> None:
    """Print the medians and the median ratio."""
    with tempfile.TemporaryDirectory() as cwd:
        cpu_seconds(PLAN, cwd)
        cpu_seconds(BARE, cwd)
        measured = [(cpu_seconds(PLAN, cwd), cpu_seconds(BARE, cwd)) for _ in range(pairs)]
    plan, bare = (statistics.median(column) for column in zip(*measured, strict=True))
    ratio = statistics.median(one / other for one, other in measured)
    print(json.dumps({"plan_cpu_s": round(plan, 3), "bare_hydra_compose_cpu_s": round(bare, 3), "ratio": round(ratio, 2), "pairs": pairs}))


if __name__ == "__main__":
    main()
