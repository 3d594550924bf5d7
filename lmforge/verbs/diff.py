"""diff A -- B: what two plans differ in and which steps run again. A and B are overrides, or one RUN each (output=FOLDER says where it lies)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmforge.compiler import compile
from lmforge.errors import ConfigError, LmforgeError
from lmforge.explain import diff
from lmforge.formats.store import find, read_json
from lmforge.plan import Plan
from lmforge.verbs._arguments import composed

OUTPUT = "output="


def main(argv: Sequence[str]) -> int:
    """Print the differences."""
    words = list(argv)
    if "--" not in words:
        raise ConfigError("diff", "expects two sides", "type: diff model=nano -- model=nano optimizer.lr=1e-3, or: diff RUN -- overrides")
    at = words.index("--")
    output = next((word.removeprefix(OUTPUT) for word in words if word.startswith(OUTPUT)), "outputs")
    print(diff(_plan(words[:at], output), _plan(words[at + 1 :], output)))
    return 0


def _plan(words: list[str], output: str) -> Plan:
    named = [word for word in words if not word.startswith(OUTPUT)]
    if len(named) == 1 and "=" not in named[0]:
        own = next((word.removeprefix(OUTPUT) for word in words if word.startswith(OUTPUT)), output)
        return _stored(named[0], find(named[0], own))
    _, experiment = composed(words)
    return compile(experiment)


def _stored(word: str, folder: Path) -> Plan:
    """The plan that a run was made by."""
    file = folder / "plan.json"
    if not file.is_file():
        raise ConfigError(word, "a step holds no plan", f"give a run: one of the folders in {folder.parent.parent / 'runs'}")
    plain = read_json(file)
    try:
        return Plan.from_json(plain)
    except (LmforgeError, LookupError, TypeError, ValueError, AttributeError) as error:  # whatever another version may have written
        why = f"{error.problems[0].where}: {error.problems[0].what}" if isinstance(error, LmforgeError) else f"{type(error).__name__} {error}"
        what = f"its plan does not read: it was made by another version, or its data has moved ({why})"
        raise ConfigError(word, what, "type the overrides it was run with instead") from error
