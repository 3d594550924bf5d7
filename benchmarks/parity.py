"""How far training under every layout is from training on one rank: the same 50 fp32 steps of a tiny Llama, on the CPU over gloo.

A row a layout and vocabulary: the largest absolute difference in loss, gradient norm (over all steps) and weights (at the end). All layouts of one number of
ranks run in one spawn. What trains is tests/parallel/tiny_mesh.py, which the tests use too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "parallel"))

import tiny_mesh
from tiny_mesh import STEPS, TOLERANCE, Case

VOCABULARIES = (64, 97)  # 97 divides by no number of ranks
WHOLE = ("ddp", "fsdp", "fsdp_zero2", "tp", "pp")
ZERO = tuple(f"deepspeed_zero{stage}" for stage in (1, 2, 3)) if importlib.util.find_spec("deepspeed") else ()
# tp splits 4 heads and pp 4 layers, so that 8 ranks need products.
LAYOUTS = {
    2: (*WHOLE, "hsdp", *ZERO),
    4: (*WHOLE, "hsdp", "fsdp_tp", "fsdp_pp", *ZERO),
    8: ("ddp", "fsdp", "hsdp", "fsdp_tp", "fsdp_pp", "3d"),
}


def rows(folder: Path, ranks: int) -> Iterator[dict[str, Any]]:
    """Train under each layout on so many ranks; one rank's runs are there."""
    cases = [Case(f"{layout}-{ranks}-{vocabulary}", layout, vocabulary=vocabulary) for layout in LAYOUTS[ranks] for vocabulary in VOCABULARIES]
    for case, line in zip(cases, tiny_mesh.launch(folder, cases, ranks, timeout=3600), strict=True):
        mesh = " x ".join(f"{axis} {size}" for axis, size in line["mesh"].items() if size > 1)
        found = tiny_mesh.apart(folder / case.name, folder / f"one-{case.vocabulary}")
        yield {
            "layout": case.layout, "ranks": ranks, "mesh": mesh, "vocabulary": case.vocabulary, **dataclasses.asdict(found),
            "seconds": round(line["seconds"], 1), "equal": found.worst() < TOLERANCE,
        }  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    far = " ".join(f"{row[key]:9.1e}" for key in ("loss", "grad_norm", "weights"))
    note = "" if row["equal"] else f"  not within {TOLERANCE}"
    return f"{row['layout']:16} {row['ranks']:5} {row['mesh']:27} {row['vocabulary']:10} {far} {row['seconds']:8.1f}{note}"


def main() -> int:
    """Print the table, and write it where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4,8", help="numbers of processes, of 2, 4 and 8")
    parser.add_argument("--json", type=Path, help="a file to write the rows to, such as benchmarks/results/parity.json")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for vocabulary in VOCABULARIES:
            tiny_mesh.run(Case(f"one-{vocabulary}", "single", vocabulary=vocabulary), folder)
        print(f"largest differences from one rank over {STEPS} fp32 steps")
        print(f"{'layout':16} {'ranks':>5} {'mesh':27} {'vocabulary':>10} {'loss':>9} {'grad norm':>9} {'weights':>9} {'seconds':>8}", flush=True)
        for ranks in map(int, given.ranks.split(",")):
            for row in rows(folder, ranks):
                found.append(row)
                print(shown(row), flush=True)
    if given.json:
        given.json.write_text("[\n  " + ",\n  ".join(map(json.dumps, found)) + "\n]\n")
    return int(not all(row["equal"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
