"""EXPLAIN ANALYZE: what was predicted of a step, and what was measured, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmforge.explain.words import columns, count, duration, gib, plain

Record = Mapping[str, Any]  # a step.json


SHORT = ("peak_bytes", "step_seconds", "tokens_per_second")  # those that say most, for a table of several runs


@dataclass(frozen=True)
class Compared:
    """One figure of a step; None where nobody predicted it, or it was not measured."""

    name: str
    key: str  # as scripts know it
    predicted: float | None
    measured: float | None
    said: Callable[[float], str]
    band: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted and self.measured is not None else None

    @property
    def verdict(self) -> str:
        """Whether a figure with a band lies in it."""
        if self.band is None or self.measured is None:
            return ""
        low, high = self.band
        return f"{'within' if low <= self.measured <= high else 'outside'} {self.said(low)} to {self.said(high)}"


def compared(record: Record) -> list[Compared]:
    """The figures of a training step; none of a step that was not measured."""
    predicted, found = record.get("predicted") or {}, record.get("measured") or {}
    if "step_seconds" not in found:
        return []
    step, band = _expected(predicted.get("step_seconds"))
    return [
        Compared("peak memory a device", "peak_bytes", (predicted.get("peak_bytes_per_device") or {}).get("total"), found.get("peak_bytes"), gib),
        Compared("resident set (host)", "resident_bytes", None, found.get("resident_bytes"), gib),
        Compared("seconds a step", "step_seconds", step, found.get("step_seconds"), duration, band),
        Compared("tokens/s", "tokens_per_second", predicted.get("tokens_per_second"), found.get("tokens_per_second"), plain),
        Compared("MFU", "mfu", predicted.get("mfu"), _mfu(predicted.get("mfu"), step, found), lambda share: f"{share:.3f}"),
        Compared("tokens", "tokens", predicted.get("tokens"), found.get("tokens"), count),
        Compared("FLOPs, 6N + 6LdT a token", "train_flops", predicted.get("train_flops"), found.get("train_flops"), lambda flops: f"{flops:.4g}"),
        Compared("training in all", "train_seconds", predicted.get("seconds"), found.get("train_seconds"), duration),
    ]


def _expected(step: Any) -> tuple[float | None, tuple[float, float] | None]:
    """The expected seconds of a step and its band, where there are any."""
    if isinstance(step, Mapping):
        low, high = step.get("low"), step.get("high")
        return step.get("expected"), (low, high) if low is not None and high is not None else None
    return step, None


def _mfu(predicted: float | None, step: float | None, found: Record) -> float | None:
    """The measured utilization: the FLOPs and the peak are those of the prediction, so only the time differs."""
    return predicted * step / found["step_seconds"] if predicted and step and found.get("step_seconds") else None


def analyze(record: Record) -> str:
    """One step as a table."""
    rows = [one for one in compared(record) if one.predicted is not None or one.measured is not None]
    if not rows:
        return f"{_title(record)}\n  it was made before steps were measured; nothing to compare"
    cells = [[one.name, _cell(one, one.predicted), _cell(one, one.measured), "-" if one.ratio is None else f"{one.ratio:.2f}", one.verdict] for one in rows]
    return "\n".join([_title(record), *(f"  {line}" for line in columns(("", "predicted", "measured", "ratio", ""), cells)), *_notes(record)])


def _title(record: Record) -> str:
    measured = record.get("measured") or {}
    on = f" on {record['step']['placement']['devices']} x {measured['device']}" if "device" in measured else ""
    return f"{record['name']} [{record['step']['stage']}]{on}"


def _notes(record: Record) -> Iterator[str]:
    """What a reader must know of the figures."""
    found, steps = record["measured"], record["metrics"].get("steps")
    if found.get("timed_steps"):
        yield f"  timed over {found['timed_steps']:,} of {steps:,} steps"
    else:
        yield "  too few steps to time one: the first is never counted, nor any before a resumed run's"


def _cell(one: Compared, value: float | None) -> str:
    return "-" if value is None else one.said(value)
