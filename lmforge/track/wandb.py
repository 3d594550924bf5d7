"""W&B runs. Offline they cost the import, one small service process and about 0.3 ms per logged step."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmforge.errors import RunError
from lmforge.track.guard import Guard, Silent, one_line
from lmforge.track.jsonl import plain
from lmforge.track.login import Mode, choose
from lmforge.track.nodes import ArtifactRef, RunInfo, Say, Tracker

if TYPE_CHECKING:
    import wandb

    from lmforge.track.nodes import Wandb

INIT_TIMEOUT_S = 20  # of an online start, before it goes offline
FINISH_TIMEOUT_S = 60  # of an upload at the end; what is left stays on disk for `wandb sync`


def start(node: Wandb, run: RunInfo, say: Say) -> Tracker:
    """Open a run in the mode that is possible, falling back to offline with one line; never stops the caller for a service."""
    # Its crash reports go to another server; without a network each would hold the process for 20 s at its end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise RunError("track=wandb", "the package wandb is not installed", "type: pip install wandb, or track=none") from error
    wandb.setup(wandb.Settings(silent=True))  # its login speaks before a run's own settings count
    mode, why = choose(node.mode)
    if mode == "disabled":
        return Silent()
    folder = Path(node.dir).expanduser() if node.dir else run.folder
    if why:
        say(f"track: W&B writes offline, {why}; later: wandb sync {folder}/wandb/offline-run-*")
    attempts = [(mode, run.id)]
    if mode == "online":
        attempts.append(("offline", f"{run.id}-offline"))  # its service keeps the id of a failed start
    for attempt, id_ in attempts:
        try:
            return Guard(WandbRun(node, run, folder, attempt, id_), "W&B", say)
        except Exception as error:  # noqa: BLE001 - whatever a service throws, the run goes on
            say(f"track: W&B did not start {attempt} ({one_line(error)})")
    return Silent()


def _settings(node: Wandb) -> wandb.Settings:
    """Nothing on the terminal, no source, no command line, no host description; sampling the machine only on request."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        symlink=False,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_disable_stats=not node.system_metrics,
    )


class WandbRun:
    """One run of W&B; several may be open in a process."""

    def __init__(self, node: Wandb, run: RunInfo, folder: Path, mode: Mode, id_: str) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._step, self._mode = 0, mode
        self._run = wandb.init(
            project=node.project,
            entity=node.entity,
            id=_name(id_),
            name=run.name,
            group=run.experiment,
            job_type=run.stage,
            config=dict(run.config),
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins runs of one id
            reinit="create_new",
            settings=_settings(node),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._run.log(dict(metrics), step=step)

    def text(self, title: str, text: str) -> None:
        import wandb

        self._run.log({title: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=self._step)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        import wandb

        # A table of its own each time: one that has been logged can no longer grow.
        table = wandb.Table(columns=list(columns), data=[[plain(cell) for cell in row] for row in rows], allow_mixed_types=True)
        self._run.log({title: table}, step=self._step)

    def artifact(self, made: ArtifactRef, inputs: Sequence[ArtifactRef]) -> None:
        for ref in inputs:
            self._use(_refer(ref, {}))
        self._run.log_artifact(_refer(made, {"inputs": [ref.name for ref in inputs]}))

    def _use(self, artifact: wandb.Artifact) -> None:
        if self._mode == "online":
            self._run.use_artifact(artifact)
        else:
            # use_artifact refuses offline, though the file format and `wandb sync` know inputs: this is what it calls online.
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)


def _refer(ref: ArtifactRef, metadata: dict[str, Any]) -> wandb.Artifact:
    """An artifact that only points at its folder: one name is one content, so nothing is hashed or uploaded."""
    import wandb

    artifact = wandb.Artifact(_name(ref.name), ref.kind, metadata=metadata)
    artifact.add_reference(ref.folder.resolve().as_uri(), checksum=False)
    return artifact


def _name(text: str) -> str:
    """W&B's names hold letters, digits, `-`, `_` and `.`, at most 128."""
    return re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)[-128:]
