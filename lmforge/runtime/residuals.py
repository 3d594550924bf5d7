"""How right the plans were: each finished training step of a store with what was predicted of it and what was measured. `calibrate` learns from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmforge.errors import LmforgeError
from lmforge.explain.analyze import Compared, compared
from lmforge.formats import store
from lmforge.plan import Cost, Step, read_step


@dataclass(frozen=True)
class Residual:
    """One measured step. `machine` is the fingerprint of the one it ran on; None where that was not recorded."""

    step: Step
    machine: str | None
    measured: dict[str, Any]  # step_seconds, tokens_per_second, peak_bytes, ...
    figures: dict[str, Compared]  # each with its predicted, measured and ratio

    @property
    def cost(self) -> Cost:
        """What was predicted."""
        return self.step.cost


def measured(output: str | Path, machine: str | None = None) -> list[Residual]:
    """Those of a store, the oldest first, of one machine or of all; steps that another version wrote, or that were not measured, are not among them."""
    root = store.steps(output)
    files = sorted(root.glob(f"*/{store.STEP_FILE}"), key=lambda file: file.stat().st_mtime) if root.is_dir() else []
    return [one for file in files for one in _read(file) if machine in (None, one.machine)]


def _read(file: Path) -> Iterator[Residual]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        figures = {one.key: one for one in compared(record)}
        if figures:
            yield Residual(read_step(record["step"]), record["measured"].get("machine"), record["measured"], figures)
    except (LmforgeError, OSError, LookupError, TypeError, ValueError, AttributeError):  # whatever another version may have written
        return
