"""Both roads of post-training over seeds: a reward model and PPO, GRPO, and DPO, each against the SFT model it starts from, on held-out data.

The pipelines are the experiments rlhf_micro, grpo_micro and dpo_micro, which share pretraining and SFT of a seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PIPELINES = ("rlhf_micro", "grpo_micro", "dpo_micro")


def run(experiment: str, seed: int, folder: Path) -> dict[str, Any]:
    """The metrics of one pipeline's steps, and the seconds it took with what was there already."""
    started = time.monotonic()
    with (folder / f"{experiment}.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "lmforge", f"experiment={experiment}", f"seed={seed}"], cwd=folder, stdout=log, stderr=log, check=True)
    newest = max((folder / "outputs/runs").glob(f"*-{experiment}"))
    return json.loads((newest / "run.json").read_text())["metrics"] | {"seconds": time.monotonic() - started}


def once(seed: int, folder: Path, pipelines: tuple[str, ...]) -> dict[str, Any]:
    """One seed's figures."""
    made = {name: run(name, seed, folder) for name in pipelines}
    row: dict[str, Any] = {"seed": seed} | {f"{name}_seconds": round(metrics["seconds"], 1) for name, metrics in made.items()}
    for name, stage in (("rlhf_micro", "ppo"), ("grpo_micro", "grpo")):
        if name in made:
            figures = made[name][stage]
            row |= {f"{stage}_{key.removeprefix('heldout_')}": round(figures[key], 5) for key in figures if key.startswith("heldout_")}
            error = figures["heldout_reward_gain_standard_error"]
            row[f"{stage}_gain_in_standard_errors"] = round(figures["heldout_reward_gain"] / error, 2) if error else None
    if "rlhf_micro" in made:
        row |= {f"reward_model_{key}": round(made["rlhf_micro"]["reward"][f"heldout_{key}"], 4) for key in ("accuracy", "accuracy_standard_error", "margin")}
    if "dpo_micro" in made:
        before, after = (made["dpo_micro"][f"eval.{name}"]["preference_accuracy"] for name in ("sft", "dpo"))
        row |= {"preference_accuracy_sft": round(before, 4), "preference_accuracy_dpo": round(after, 4), "dpo_gain_points": round(100 * (after - before), 2)}
    return row


def main() -> None:
    """Print one JSON object: a row per seed, means and their standard errors over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pipelines", default=",".join(PIPELINES))
    args = parser.parse_args()
    rows = []
    for seed in args.seeds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(once(int(seed), Path(folder), tuple(args.pipelines.split(","))))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "seed"}
    means = {key: None if None in values else round(statistics.mean(values), 4) for key, values in columns.items()}
    errors = {key: None if means[key] is None else round(statistics.stdev(columns[key]) / len(rows) ** 0.5, 4) for key in means} if len(rows) > 1 else {}
    print(json.dumps({"rows": rows, "mean": means, "standard_error": errors}, indent=1))


if __name__ == "__main__":
    main()
