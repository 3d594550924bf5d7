"""The layout of an output folder: steps/<name>-<digest>/ shared by all experiments, runs/<time>-<experiment>/ naming its steps.

A RUN argument is a run folder, a step folder, or the first characters of a digest. Where weights are asked for it may also
be a hub id: `org/name`, `org/name@<commit>`, or a bare `name`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lmforge.errors import ConfigError

STEP_FILE = "step.json"  # written last: a folder that has it is a finished step
RUN_FILE = "run.json"
STATE_INDEX = "state/index.json"  # what a step that is not finished can go on from
ADAPTER_FILE = "adapter_config.json"  # what makes a folder a PEFT adapter
TOKENIZER_FILES = (  # of a Hugging Face folder; nothing in them runs
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.model",
    "*.jinja",
    "*.txt",
    "merges*",
)
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<commit>[0-9a-f]{40}))?")
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


def hub_id(source: str) -> tuple[str, str | None] | None:
    """The name and the pinned commit of `name`, `org/name` or either with `@<40 hex digits>`; None for what cannot be a hub id."""
    found = HUB_ID.fullmatch(source)
    return (found["name"], found["commit"]) if found else None


def hub_cache() -> Path:
    """The local Hugging Face cache, by huggingface_hub's rules (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))).expanduser()


def hub_repository(name: str) -> Path:
    """Where the local cache keeps a hub id's files, whether or not it has any."""
    return hub_cache() / f"models--{name.replace('/', '--')}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; ConfigError in one line where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), f"cannot be read: {error}", "delete the folder and run again") from error
    if not isinstance(found, dict):
        raise ConfigError(str(file), "expected a JSON object", "delete the folder and run again")
    return found


def find(reference: str, output: str | Path, also: str = "") -> Path:
    """The run or step folder a RUN argument means; ConfigError with what there is, and what else (`also`) could be given."""
    path = Path(reference)
    for file in (RUN_FILE, STEP_FILE):
        if (path / file).is_file():
            return path
    named = _named(reference, output)
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(reference, f"means {len(named)} steps: {', '.join(folder.name for folder in named[:4])}", "give more characters of the digest")
    latest = [folder.name for folder in sorted(runs(output).iterdir())[-3:]] if runs(output).is_dir() else []
    hint = f"the latest runs are: {', '.join(latest)}" if latest else f"{runs(output)} is empty"
    raise ConfigError(reference, "no such run, step or digest", f"{hint}; {also}" if also else hint)


def _named(reference: str, output: str | Path) -> list[Path]:
    """The runs and steps of that name, or else the finished steps whose digest begins so."""
    named = [folder for root in (runs(output), steps(output)) if root.is_dir() for folder in sorted(root.iterdir()) if folder.name == reference]
    if named or not DIGEST.fullmatch(reference) or not steps(output).is_dir():
        return named
    return [folder for folder in sorted(steps(output).iterdir()) if folder.name.rpartition("-")[2].startswith(reference) and (folder / STEP_FILE).is_file()]


def _means_hub(reference: str, output: str | Path) -> bool:
    """Whether weights are asked of the hub: pinned, or `org/name`, or a bare name that is in the local cache and names no run, step or digest."""
    found = hub_id(reference)
    if found is None or Path(reference).exists():
        return False
    name, commit = found
    if commit:
        return True
    if "/" in name:
        return not Path(reference).parent.exists()
    return hub_repository(name).is_dir() and not _named(reference, output)


def checkpoint_of(reference: str, output: str | Path) -> str:
    """A folder of weights for a folder, a run, a step or a digest; a hub id stays as it is.

    What exists here wins over the hub, and a bare word is a hub id only if the local cache has it: a mistyped run is never asked of the hub.
    """
    path = Path(reference)
    if path.is_dir() and (path / "config.json").is_file():
        return str(path)
    if (path / ADAPTER_FILE).is_file():
        raise ConfigError(reference, "is an adapter, not weights", f"type: lmforge merge {reference} <folder for the weights>, and give that folder")
    if path.exists() and not any((path / file).is_file() for file in (RUN_FILE, STEP_FILE)):
        raise ConfigError(reference, "not a checkpoint folder: it has no config.json", "give a Hugging Face folder, a run, or a hub id")
    if _means_hub(reference, output):
        return reference
    folder = find(reference, output, also="a hub id reads org/name, or org/name@<commit> with all its 40 hex digits")
    if (folder / RUN_FILE).is_file():
        folder = _last_trained(folder, reference)
    if (folder / "adapter" / ADAPTER_FILE).is_file():
        raise ConfigError(reference, "made an adapter, not weights", f"type: lmforge merge {folder} <folder for the weights>, and give that folder")
    if not (folder / "checkpoint" / "config.json").is_file():
        raise ConfigError(reference, "this step made no checkpoint", "give a training step or a folder of weights")
    return str(folder / "checkpoint")


def reward_model_of(reference: str, output: str | Path) -> str:
    """A folder with a reward model for a folder, a run, a step or a digest; a hub id stays as it is."""
    path = Path(reference)
    if path.is_dir() and (path / "config.json").is_file():
        return str(path)
    if _means_hub(reference, output):
        return reference
    folder = find(reference, output, also="a hub id reads org/name, or org/name@<commit> with all its 40 hex digits")
    named = [folder.parent.parent / "steps" / name for name in read_json(folder / RUN_FILE)["steps"]] if (folder / RUN_FILE).is_file() else [folder]
    made = [step / "reward_model" for step in named if (step / "reward_model" / "config.json").is_file()]
    if not made:
        raise ConfigError(reference, "made no reward model", "give a run or a step of stage=reward")
    return str(made[-1])


def _last_trained(run: Path, reference: str) -> Path:
    """The last step of a run that made weights or an adapter, quantization aside."""
    names: list[str] = read_json(run / RUN_FILE)["steps"]
    made = [run.parent.parent / "steps" / name for name in names if not name.startswith("quantize")]
    made = [step for step in made if any((step / file).is_file() for file in ("checkpoint/config.json", f"adapter/{ADAPTER_FILE}"))]
    if not made:
        raise ConfigError(reference, "this run made no checkpoint", "give a step or a folder of weights")
    return made[-1]
