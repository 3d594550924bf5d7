"""The quickstart from an empty folder, once per seed: what it takes and what it learns, then the same command typed again."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def timed(words: list[str], cwd: Path) -> float:
    """Wall seconds of one command line; its own words go to quickstart.log in `cwd`."""
    started = time.monotonic()
    with (cwd / "quickstart.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "lmforge", *words], cwd=cwd, stdout=log, stderr=log, check=True)
    return time.monotonic() - started


def once(seed: int, folder: Path) -> dict[str, Any]:
    """One seed, from nothing and then again."""
    words = [f"seed={seed}"]
    first, again = timed(words, folder), timed(words, folder)
    newest = max((folder / "outputs/runs").iterdir())
    metrics = json.loads((newest / "run.json").read_text())["metrics"]
    pretrained, tuned, preferred, small = (metrics[f"eval.{name}"] for name in ("pretrain", "sft", "dpo", "quantize"))
    return {
        "seed": seed,
        "seconds": round(first, 1),
        "seconds_typed_again": round(again, 2),
        "perplexity_untrained": round(pretrained["untrained_perplexity"], 1),
        "perplexity_bigram": round(pretrained["bigram_perplexity"], 2),
        "perplexity_pretrained": round(pretrained["perplexity"], 2),
        "perplexity_ratio_to_bigram": round(pretrained["perplexity"] / pretrained["bigram_perplexity"], 3),
        "preference_accuracy_sft": round(tuned["preference_accuracy"], 4),
        "preference_accuracy_dpo": round(preferred["preference_accuracy"], 4),
        "preference_gain_points": round(100 * (preferred["preference_accuracy"] - tuned["preference_accuracy"]), 2),
        "int8_size_ratio": round(metrics["quantize"]["size_ratio"], 4),
        "int8_perplexity_change_percent": round(100 * (small["perplexity"] / preferred["perplexity"] - 1), 3),
    }


def main() -> None:
    """Print one JSON object: a row per seed, means with standard errors, peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0")
    rows = []
    for seed in parser.parse_args().seeds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(once(int(seed), Path(folder)))
    means = {key: round(statistics.mean(row[key] for row in rows), 4) for key in rows[0] if key != "seed"}
    errors = {key: round(statistics.stdev(row[key] for row in rows) / len(rows) ** 0.5, 4) for key in means} if len(rows) > 1 else {}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"rows": rows, "mean": means, "standard_error": errors, "peak_gib": round(peak / 2**30, 2)}, indent=1))


if __name__ == "__main__":
    main()
