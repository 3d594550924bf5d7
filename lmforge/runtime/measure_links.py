"""An all-reduce between two ranks of this machine: gloo on a CPU, nccl between two GPUs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lmforge.errors import RunError

SMALL, LARGE = 2**10, {"gloo": 2**22, "nccl": 2**28}  # bytes
TIMES = {"gloo": (200, 8), "nccl": (200, 20)}
PATIENCE_S = 40.0


def all_reduce(gpu: bool) -> tuple[float, float]:
    """Bytes/s and seconds of a ring's step, by `links.ring_all_reduce` over two ranks. RunError where the ranks do not come through."""
    with tempfile.TemporaryDirectory(prefix="lmforge-calibrate-") as where:
        threads = str(max(1, (os.cpu_count() or 1) // 2))
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        command = [sys.executable, "-m", "lmforge.runtime.measure_links", where, "nccl" if gpu else "gloo"]
        ranks = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in range(2)]
        try:
            for rank in ranks:
                _, said = rank.communicate(timeout=PATIENCE_S)
                if rank.returncode:
                    last = (said.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
                    raise RunError("calibrate", f"two ranks could not be measured: {last}", "type calibrate links=false")
        except subprocess.TimeoutExpired as error:
            raise RunError("calibrate", f"two ranks did not answer within {PATIENCE_S:g} s", "type calibrate links=false") from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        small, large, size = json.loads((Path(where) / "found.json").read_text())
    latency = small / 2
    return size / max(large - small, large / 10), latency


def rank(where: str, backend: str, number: int) -> None:
    """One of the two; the first writes what it found."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"file://{where}/ranks", rank=number, world_size=2)
    found = []
    for size, times in zip((SMALL, LARGE[backend]), TIMES[backend], strict=True):
        data = torch.ones(size // 4, device=device)
        taken = []
        for _ in range(times + 2):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(data)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
        found.append(statistics.median(taken[2:]))
    if number == 0:
        (Path(where) / "found.json").write_text(json.dumps([*found, LARGE[backend]]))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank(sys.argv[1], sys.argv[2], int(sys.argv[3]))
