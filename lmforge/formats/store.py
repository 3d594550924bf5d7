"""The layout of an output folder: steps/<name>-<digest>/ shared by all experiments, runs/<time>-<experiment>/ naming its steps.

A RUN argument is a run folder, a step folder, or the first characters of a digest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lmforge.errors import ConfigError

STEP_FILE = "step.json"  # written last: a folder that has it is a finished step
RUN_FILE = "run.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DIGEST = re.compile(r"[0-9a-f]{4,64}")


def steps(output: str | Path) -> Path:
    """Where steps live."""
    return Path(output) / "steps"


def runs(output: str | Path) -> Path:
    """Where runs live."""
    return Path(output) / "runs"


def cache(output: str | Path, name: str) -> Path | None:
    """Where hashes of large files are remembered; None until a run has made the folder, for planning writes nothing."""
    folder = Path(output) / ".cache"
    return folder / name if folder.is_dir() else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; ConfigError in one line where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), f"cannot be read: {error}", "delete the folder and run again") from error
    if not isinstance(found, dict):
        raise ConfigError(str(file), "expected a JSON object", "delete the folder and run again")
    return found


def find(reference: str, output: str | Path) -> Path:
    """The run or step folder a RUN argument means; ConfigError with what there is."""
    path = Path(reference)
    for file in (RUN_FILE, STEP_FILE):
        if (path / file).is_file():
            return path
    named = [folder for root in (runs(output), steps(output)) if root.is_dir() for folder in sorted(root.iterdir()) if folder.name == reference]
    if not named and DIGEST.fullmatch(reference) and steps(output).is_dir():
        named = [
            folder for folder in sorted(steps(output).iterdir()) if folder.name.rpartition("-")[2].startswith(reference) and (folder / STEP_FILE).is_file()
        ]
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(reference, f"means {len(named)} steps: {', '.join(folder.name for folder in named[:4])}", "give more characters of the digest")
    latest = [folder.name for folder in sorted(runs(output).iterdir())[-3:]] if runs(output).is_dir() else []
    hint = f"the latest runs are: {', '.join(latest)}" if latest else f"{runs(output)} is empty"
    raise ConfigError(reference, "no such run, step or digest", hint)


def checkpoint_of(reference: str, output: str | Path) -> str:
    """A folder of weights for a folder, a run, a step or a digest; a hub id stays as it is."""
    path = Path(reference)
    if path.is_dir() and (path / "config.json").is_file():
        return str(path)
    if path.exists() and not any((path / file).is_file() for file in (RUN_FILE, STEP_FILE)):
        raise ConfigError(reference, "not a checkpoint folder: it has no config.json", "give a Hugging Face folder, a run, or a hub id")
    if not path.exists() and HUB_ID.fullmatch(reference) and not path.parent.exists():
        return reference
    folder = find(reference, output)
    if (folder / RUN_FILE).is_file():
        made = [name for name in read_json(folder / RUN_FILE)["steps"] if (folder.parent.parent / "steps" / name / "checkpoint" / "config.json").is_file()]
        trained = [name for name in made if not name.startswith("quantize")]
        if not trained:
            raise ConfigError(reference, "this run made no checkpoint", "give a step or a folder of weights")
        folder = folder.parent.parent / "steps" / trained[-1]
    if not (folder / "checkpoint" / "config.json").is_file():
        raise ConfigError(reference, "this step made no checkpoint", "give a training step or a folder of weights")
    return str(folder / "checkpoint")
