"""Predicted peak memory beside what was measured: tensor bytes of real training steps on this machine's CPU, ranks that share a step, and torchtune's table.

    python benchmarks/memory.py [--data ../shared/data] [--write]

The 24 cells are model x stage x adapter x checkpointing x length x micro-batch, 0.3M to 50M parameters; 22 more vary precision, attention, accumulation,
families and optimizers, and 14 run on two ranks over gloo, which keeps what it sends for a moment, so that the least of five steps counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "predict"))

import torch
import torchtune_rows
from memory_cells import Cell
from tiny_models import FAMILIES, llama
from tracked_steps import compared, on_ranks

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
NANO, MICRO = llama(64, 4, 2, 2, 176, 2048), llama(128, 4, 4, 4, 256, 2048)
M6, M25, M50 = llama(256, 6, 4, 2, 704, 8192, tied=False), llama(512, 8, 8, 8, 1408, 8192), llama(640, 10, 10, 5, 1728, 8192, tied=False)
O7 = {**llama(256, 6, 4, 4, 704, 8192, tied=False), "model_type": "olmo2"}
SMALL, DEEP = llama(128, 4, 4, 2, 256, 2048, tied=False), llama(256, 6, 4, 4, 704, 1024, tied=False)
FULL, SOME, BF16 = {"checkpointing": "full"}, {"checkpointing": "selective"}, {"compute_dtype": "bfloat16"}
LOW: dict[str, Any] = {"adapter": "lora"}
FOUR: dict[str, Any] = {"adapter": "qlora"}
MAIN = [
    Cell(NANO, "pretrain", 256, 8), Cell(NANO, "sft", 128, 16, **LOW, **FULL), Cell(NANO, "dpo", 256, 4, **SOME), Cell(NANO, "reward", 128, 4),
    Cell(MICRO, "pretrain", 256, 8, **FULL), Cell(MICRO, "sft", 256, 4, documents=4, **LOW), Cell(MICRO, "dpo", 128, 8, **LOW, **FULL),
    Cell(MICRO, "pretrain", 256, 2, documents=2, **SOME), Cell(MICRO, "sft", 128, 4, **FOUR), Cell(MICRO, "reward", 256, 2, **LOW),
    Cell(M6, "pretrain", 512, 4), Cell(M6, "pretrain", 1024, 4, **FULL), Cell(M6, "sft", 512, 4, documents=4, **LOW, **SOME), Cell(M6, "dpo", 256, 2),
    Cell(M6, "sft", 512, 2, **FOUR, **FULL), Cell(M6, "dpo", 256, 2, **FOUR), Cell(O7, "pretrain", 512, 2), Cell(O7, "sft", 512, 4, **LOW, **FULL),
    Cell(O7, "dpo", 256, 2, **SOME), Cell(M25, "pretrain", 512, 2, **SOME), Cell(M25, "sft", 512, 2, **LOW), Cell(M25, "pretrain", 128, 1),
    Cell(M50, "pretrain", 512, 2, **FULL), Cell(M50, "dpo", 256, 1, **LOW, **FULL),
]  # fmt: skip
ANSWERS: dict[str, Any] = {"changes": {"stage": {"epochs": 1, "minibatches": 1, "group_size": 2}}}
MORE = [
    Cell(M6, "pretrain", 512, 2, **BF16), Cell(M6, "sft", 512, 2, **LOW, **FULL, **BF16), Cell(M6, "sft", 256, 2, **FOUR, **SOME, **BF16),
    Cell(M6, "pretrain", 256, 2, param_dtype="bfloat16", **FULL, **BF16), Cell(M6, "pretrain", 256, 2, accumulation=2), Cell(M6, "dpo", 256, 2, adapter="dora"),
    Cell(M6, "dpo", 256, 2, prompt=64, **BF16), Cell(M6, "orpo", 256, 2, changes={"stage": {"nll_over_prompt": True}}), Cell(M6, "kto", 256, 4),
    Cell(M6, "sft", 256, 2, adapter="prompt_tuning"), Cell(M6, "ppo", 128, 4, changes={"stage": {"epochs": 1, "minibatches": 1}}),
    Cell(M6, "grpo", 128, 8, **ANSWERS), Cell(MICRO, "pretrain", 64, 1, optimizer="muon"), Cell(MICRO, "pretrain", 64, 1, optimizer="adafactor"),
    *(Cell(FAMILIES[name], "pretrain", 128, 2) for name in ("mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2", "mixtral", "qwen3_moe")),
]  # fmt: skip
TWO: dict[str, Any] = {"devices": 2}
SPREAD = [
    Cell(SMALL, "pretrain", 128, 2, layout="ddp", **TWO), Cell(DEEP, "pretrain", 32, 1, layout="ddp", reduce_dtype="bfloat16", **TWO, **BF16),
    Cell(DEEP, "pretrain", 64, 1, layout="fsdp", **TWO), Cell(DEEP, "pretrain", 64, 2, layout="fsdp", **TWO, **FULL, **BF16),
    Cell(DEEP, "pretrain", 64, 1, layout="fsdp", accumulation=2, **TWO), Cell(DEEP, "sft", 64, 2, layout="fsdp", **TWO, **LOW),
    Cell(DEEP, "pretrain", 64, 1, layout="fsdp", changes={"parallel": {"reshard_after_forward": False}}, **TWO),
    Cell(SMALL, "dpo", 128, 2, layout="fsdp", **TWO),
    Cell(SMALL, "pretrain", 128, 2, layout="tp", **TWO), Cell(FAMILIES["qwen3"], "pretrain", 128, 2, layout="tp", **TWO),
    Cell(SMALL, "pretrain", 128, 2, layout="pp", accumulation=4, **TWO),
    Cell(SMALL, "pretrain", 128, 2, layout="pp", accumulation=4, changes={"parallel": {"pp_schedule": "gpipe"}}, **TWO),
    Cell(DEEP, "pretrain", 64, 1, layout="deepspeed_zero2", **TWO), Cell(DEEP, "pretrain", 64, 1, layout="deepspeed_zero3", **TWO),
]  # fmt: skip


def summary(name: str, errors: list[float]) -> dict[str, Any]:
    """Percent."""
    sizes = [abs(one) for one in errors]
    found = {"cells": len(errors), "median": statistics.median(sizes), "worst": max(sizes), "most_under": min(0.0, *errors)}
    found = {key: value if key == "cells" else round(100 * value, 3) for key, value in found.items()}
    print(f"{name}: {found['cells']} cells, median {found['median']} %, worst {found['worst']} %, most under {found['most_under']} %\n", flush=True)
    return found


def told(line: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{100 * line['error']:+8.3f} %  predicted {line['predicted']:>13,}  measured {line['measured']:>13,}  {line['moment']:26} {line['cell']}", flush=True
    )
    return {key: line[key] for key in ("cell", "predicted", "measured", "error", "moment", "parts")}


def steps(name: str, cells: list[Cell], folder: Path) -> dict[str, Any]:
    lines = [told(compared(cell, folder / name / str(number))) for number, cell in enumerate(cells)]
    return {"summary": summary(name, [line["error"] for line in lines]), "cells": lines}


def ranks(name: str, cells: list[Cell], folder: Path) -> dict[str, Any]:
    lines = [told(line) for line in on_ranks(cells, folder / name, 2)]
    return {"summary": summary(name, [line["error"] for line in lines]), "cells": lines}


def torchtune(data: Path) -> dict[str, Any]:
    """Its measured rows that state lengths; the row whose stated batch cannot have been is counted too."""
    with (data / "memory_measurements.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    lines = []
    for name, settings in torchtune_rows.ROWS.items():
        row = rows[name.split()[0]]
        measured = float(row["mem_value"]) * (GIB if "GiB" in row["mem_unit"] else 1e9)
        moments = torchtune_rows.moments(settings)
        moment = max(moments, key=lambda one: moments[one])
        line = {"row": name, "predicted": moments[moment] / GIB, "measured": measured / GIB, "error": moments[moment] / measured - 1, "moment": moment}
        said = f"{row['model'].removeprefix('llama')} {row['method']} {row['hardware']} {row['extra'][:50]}"
        print(f"{100 * line['error']:+8.1f} %  predicted {line['predicted']:6.1f} GiB  measured {line['measured']:6.1f} GiB  {moment:12} {name} {said}")
        lines.append(line)
    return {"summary": summary("torchtune", [line["error"] for line in lines if "batch" not in line["row"]]), "rows": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of published tables")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/memory.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"main": steps("main", MAIN, Path(folder)), "more": steps("more", MORE, Path(folder)), "ranks": ranks("ranks", SPREAD, Path(folder))}
    if given.data.is_dir():
        found["torchtune"] = torchtune(given.data)
    else:
        print(f"{given.data} is not here: no published tables")
    if given.write:
        (ROOT / "benchmarks" / "results" / "memory.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
