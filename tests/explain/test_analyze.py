"""EXPLAIN ANALYZE: predicted and measured side by side, whatever of them is there."""

from __future__ import annotations

from typing import Any

from lmforge.explain.analyze import analyze, compared


def record(predicted: dict[str, Any], **measured: Any) -> dict[str, Any]:
    found = {"seconds": 9.0, "step_seconds": 0.5, "tokens_per_second": 8192.0, "timed_steps": 9, "peak_bytes": 3 * 2**30, "resident_bytes": 2**30, **measured}
    step = {"stage": "pretrain", "placement": {"devices": 2}, "cost": predicted}
    return {"name": "pretrain", "step": step, "metrics": {"steps": 10}, "predicted": predicted, "measured": {"device": "a GPU", "tokens": 40960, **found}}


PREDICTED = {
    "tokens": 40960,
    "train_flops": 1e12,
    "peak_bytes_per_device": {"total": 2 * 2**30},
    "step_seconds": {"low": 0.3, "expected": 0.4, "high": 0.45},
    "tokens_per_second": 10240.0,
    "mfu": 0.5,
    "seconds": 4.0,
}


def test_each_figure_has_its_ratio_and_a_band_its_verdict() -> None:
    figures = {one.key: one for one in compared(record(PREDICTED, train_flops=1e12, train_seconds=5.0))}
    assert (figures["peak_bytes"].ratio, figures["step_seconds"].ratio, figures["tokens"].ratio) == (1.5, 1.25, 1.0)
    assert figures["step_seconds"].verdict == "outside 300 ms to 450 ms"
    assert figures["mfu"].measured == 0.5 * 0.4 / 0.5  # the same FLOPs and peak in another time
    assert figures["resident_bytes"].ratio is None
    text = analyze(record(PREDICTED, train_flops=1e12, train_seconds=5.0))
    assert text.splitlines()[0] == "pretrain [pretrain] on 2 x a GPU"
    assert "peak memory a device" in text
    assert next(line for line in text.splitlines() if "seconds a step" in line).split()[3:8] == ["400", "ms", "500", "ms", "1.25"]
    assert text.splitlines()[-1] == "  timed over 9 of 10 steps"


def test_what_was_not_predicted_or_measured_is_a_dash() -> None:
    text = analyze(record({"tokens": 40960, "peak_bytes_per_device": {"total": None}}, peak_bytes=None, step_seconds=None, timed_steps=0))
    row = next(line for line in text.splitlines() if "tokens/s" in line)
    assert row.split() == ["tokens/s", "-", "8,192", "-"]
    assert "peak memory" not in text  # neither
    assert text.splitlines()[-1].startswith("  too few steps to time one")


def test_a_step_of_an_earlier_version_says_so() -> None:
    old = {"name": "sft", "step": {"stage": "sft", "placement": {"devices": 1}}, "metrics": {}, "predicted": PREDICTED, "measured": {"seconds": 3.0}}
    assert compared(old) == []
    assert "before steps were measured" in analyze(old)
