"""Whether a step's update is taken: one that is not finite, or whose loss or gradient norm spikes, is skipped by all ranks together.

The rule is that of OLMo-core's SkipStepOptimizer (`olmo_core/optim/skip_step_optimizer.py`): more than sigma sample standard deviations from the mean of the
last steps, of the loss or of the gradient norm. Four things differ: only what lies above counts, for a loss that drops is no harm; skipped steps never enter
the window, so that a spike does not widen what is tolerated after it; a spread of zero judges nothing; and there is a cap, since OLMo-core would skip for ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmforge.errors import RunError

LEAST = 20  # accepted steps before any is judged: OLMo-core's number; the spread of so few is known to a sixth
NAMED = 5  # skipped steps that the last error names; metrics.jsonl has all
ROWS_NAMED = 64  # rows that it names


class Guard:
    """Decisions on numbers that are equal on all ranks, so that the ranks agree without asking each other again.

    `max_skips` counts over the whole run, resumes included; where it is 0 the guard is not `enabled` and is not to be asked: `Meter.watch` then finds the
    first step that is not finite without making the host wait.
    """

    def __init__(self, sigma: float | None, window: int, max_skips: int) -> None:
        self.sigma, self.max_skips = sigma, max_skips
        # Half a window, as OLMo-core has it: until then the falling loss of the first steps is all there is. A window under 20 is judged once it is full.
        self.least = min(window, max(LEAST, window // 2))
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.skipped = 0
        self.recent: deque[str] = deque(maxlen=NAMED)

    @property
    def enabled(self) -> bool:
        return self.max_skips > 0

    def skips(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        rows: Callable[[], Iterable[int]],
        tell: Callable[[Mapping[str, Any]], None] = lambda line: None,
        *,
        overflowed: bool = False,
    ) -> bool:
        """Whether the update of `step` (from 0) must be left out. `loss` is the global batch's mean, `grad_norm` the global norm before clipping.

        `rows` (the global batch's row numbers) is called for a skipped step only, and `tell` with its line of metrics, before a RunError for one too many.
        `overflowed` is a loss scale's own finding: where the loss is finite that is the scale's business, neither judged, counted nor part of the window.
        """
        if overflowed and math.isfinite(loss):
            return False
        why = self._why(loss, grad_norm)
        if not why:
            self.losses.append(loss)
            self.norms.append(grad_norm)
            return False
        taken = [int(row) for row in rows()]
        self.skipped += 1
        self.recent.append(f"step {step} ({why}: loss {loss:.6g}, gradient norm {grad_norm:.6g})")
        tell({"skipped/step": step, "skipped/loss": loss, "skipped/grad_norm": grad_norm, "skipped/count": self.skipped, "skipped/rows": taken})
        if self.skipped > self.max_skips:
            raise self._too_many(taken)
        return True

    def _why(self, loss: float, grad_norm: float) -> str:
        """Why a step is to be skipped, or an empty string."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "not finite"
        if self.sigma is None or len(self.losses) < self.least:
            return ""
        spikes = exceeds(loss, self.losses, self.sigma) or exceeds(grad_norm, self.norms, self.sigma)
        return f"more than {self.sigma:g} sigma" if spikes else ""

    def _too_many(self, rows: Sequence[int]) -> RunError:
        earlier = self.skipped - len(self.recent)
        named = ", ".join(self.recent) + (f" and {earlier} before" if earlier else "")
        shown = " ".join(map(str, rows[:ROWS_NAMED])) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
        what = f"{self.skipped} steps had to be skipped, {self.max_skips} may be: {named}"
        return RunError("optimizer.max_skips", what, f"look at rows {shown} of the last one, or take a lower optimizer.lr or more warm-up")

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, all finite: what a resumed run needs to decide as an undisturbed one."""
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mine, theirs in ((self.losses, state["losses"]), (self.norms, state["norms"]), (self.recent, state["recent"])):
            mine.clear()
            mine.extend(theirs)
        self.skipped = state["skipped"]


def exceeds(value: float, window: Sequence[float] | deque[float], sigma: float) -> bool:
    """Whether `value` lies more than `sigma` sample standard deviations above the mean of the window (two values or more).

    Never above a window of equal values: gradients of zero, as GRPO has them while all answers to a prompt earn the same, say nothing of the spread.
    """
    mean = math.fsum(window) / len(window)
    # fsum rounds once, so the answer does not depend on the order in which a resumed run adds up.
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in window) / (len(window) - 1))
    return min(window) < max(window) and value > mean + sigma * spread


def agreed(loss: Tensor, weight: Tensor, norm: Tensor, *, speaks: bool) -> tuple[float, float]:
    """The global batch's mean loss and the gradient norm, the same bits on every rank; waits for the device.

    `loss` is this rank's share of the sum, counted where the rank `speaks` for its rows; `weight` is the global batch's. Rank 0's norm counts: those of other
    ranks may differ from it in the last bit, and ranks that decide differently would wait for each other for ever.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    zero = torch.zeros((), dtype=torch.float64, device=loss.device)
    both = torch.stack([loss.detach().double() if speaks else zero, norm.detach().double().to(loss.device) if first else zero])
    if dist.is_initialized():
        dist.all_reduce(both)
    total, whole = (both / torch.stack([weight.double().clamp_min(1), torch.ones_like(zero)])).tolist()
    return total, whole
