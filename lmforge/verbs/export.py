"""export RUN OUT [output=FOLDER]: the weights of a run, a step or an unfinished step's state as a Hugging Face folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmforge.errors import ConfigError
from lmforge.formats import store

OUTPUT = "output="
INDEX = "index.json"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError("export", message, "type: export RUN OUT")


def main(argv: Sequence[str]) -> int:
    """Write the folder and say what it is."""
    parser = _Parser(prog="lmforge export", description=__doc__)
    parser.add_argument("run", help="a run, a step, a digest, or the state folder of a step that is not done")
    parser.add_argument("out", help="the folder to write; it must not exist")
    parser.add_argument("--output", default="outputs", help="where runs and steps are looked for; also output=FOLDER")
    words = [f"--output={word.removeprefix(OUTPUT)}" if word.startswith(OUTPUT) else word for word in argv]
    args = parser.parse_intermixed_args(words)
    out = Path(args.out)
    if out.exists():
        raise ConfigError(args.out, "is there already", "give a folder that does not exist yet")
    state = _of_run(args.run, args.output) or _of_step(args.run, args.output)
    print(f"{out}: {_released(state, out) if state else _copied(_checkpoint(args.run, args.output), out)}")
    return 0


def _of_run(reference: str, output: str) -> Path | None:
    """The state of the last step that has one, in a run that is not done."""
    for run in (Path(reference), store.runs(output) / reference):
        if not (run / "plan.json").is_file() or (run / store.RUN_FILE).is_file():
            continue
        names = [f"{step['name']}-{step['digest']}" for step in store.read_json(run / "plan.json")["steps"]]
        steps = [run.parent.parent / "steps" / name for name in names]
        if states := [step / "state" for step in steps if _unfinished(step)]:
            return states[-1]
        done = ", ".join(step.name for step in steps if (step / store.STEP_FILE).is_file())
        raise ConfigError(reference, "is a run that is not done, and none of its steps has a state", f"give a finished step of it: {done or 'there is none'}")
    return None


def _of_step(reference: str, output: str) -> Path | None:
    """The state folder itself, or that of a step that is not done, by its folder, its name or the first characters of its digest."""
    path = Path(reference)
    for folder in (path, path.parent) if path.name == "state" else (path,):
        if _unfinished(folder):
            return folder / "state"
    known = sorted(store.steps(output).iterdir()) if store.steps(output).is_dir() else []
    meant = [step for step in known if _means(reference, step.name) and (_unfinished(step) or (step / store.STEP_FILE).is_file())]
    states = [step / "state" for step in meant if _unfinished(step)]
    if states and len(meant) > 1:
        raise ConfigError(reference, f"means {len(meant)} steps: {', '.join(one.name for one in meant[:4])}", "give more characters of the digest")
    return states[0] if states else None


def _unfinished(step: Path) -> bool:
    return (step / "state" / INDEX).is_file() and not (step / store.STEP_FILE).is_file()


def _means(reference: str, name: str) -> bool:
    digest = name.rpartition("-")[2]
    return name == reference or (store.DIGEST.fullmatch(reference) is not None and digest.startswith(reference))


def _checkpoint(reference: str, output: str) -> Path:
    """The folder of weights, a reward model's too, that a run or a finished step made."""
    try:
        found = Path(store.checkpoint_of(reference, output))
    except ConfigError:
        try:
            return Path(store.reward_model_of(reference, output))
        except ConfigError:
            pass
        raise
    if not found.is_dir():
        raise ConfigError(reference, "is a hub id", "give a run, a step or a state folder")
    return found


def _copied(folder: Path, out: Path) -> str:
    from lmforge.inference.saving import whole_folder

    with whole_folder(out) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    return f"a copy of {folder}"


def _released(folder: Path, out: Path) -> str:
    from lmforge.training.state import open_state, release

    saved = open_state(folder)
    assert saved is not None  # its index was there
    files = release(saved, out)
    size = sum(path.stat().st_size for path in files)
    return f"the weights of {folder} after step {saved.step}, {size / 2**20:,.1f} MiB in {len(files)} file{'s' if len(files) > 1 else ''}"
