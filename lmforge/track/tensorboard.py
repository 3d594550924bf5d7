"""TensorBoard event files, written by torch's own writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmforge.errors import RunError
from lmforge.track.guard import Guard
from lmforge.track.nodes import ArtifactRef, RunInfo, Say, Tracker

if TYPE_CHECKING:
    from lmforge.track.nodes import TensorBoard


def start(node: TensorBoard, run: RunInfo, say: Say) -> Tracker:
    """Open the event file; RunError where tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise RunError("track=tensorboard", "the package tensorboard is not installed", 'type: pip install "lmforge[tensorboard]"') from error
    return Guard(TensorBoardRun(node, run), "TensorBoard", say)


class TensorBoardRun:
    """One folder of event files."""

    def __init__(self, node: TensorBoard, run: RunInfo) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(node.dir).expanduser() / run.experiment / run.name if node.dir else run.folder / "tensorboard"
        # What an interrupted run wrote past its last state is hidden.
        purge = None if run.resumed_from is None else run.resumed_from + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=node.flush_s)
        self._step = run.resumed_from or 0
        self.text("plan", yaml.safe_dump({"stage": run.stage, "config": dict(run.config)}, sort_keys=False))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def text(self, title: str, text: str) -> None:
        lines = text.splitlines() or [""]
        self._writer.add_text(title, "\n".join(f"    {line}" for line in lines), self._step)  # indented: Markdown shows it as it is

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(title, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), self._step)

    def artifact(self, made: ArtifactRef, inputs: Sequence[ArtifactRef]) -> None:
        self.text(f"artifact/{made.kind}", "\n".join([f"{made.name} = {made.folder}", *(f"from {ref.name} = {ref.folder}" for ref in inputs)]))

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        for name, value in summary.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"final/{name}", value, self._step)
        self._writer.close()


MARKS = {ord(sign): f"&#{ord(sign)};" for sign in "\\`*_{}[]<>()#|~&"} | {ord("\n"): "<br>"}


def _cell(value: object) -> str:
    """What Markdown shows as this text within one cell of a table."""
    return str(value).translate(MARKS).replace("  ", "&nbsp; ")
