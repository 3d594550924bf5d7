"""diff A -- B: what two plans differ in and which steps run again. A and B are overrides, or one RUN each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmforge.compiler import compile
from lmforge.errors import ConfigError
from lmforge.explain import diff
from lmforge.formats.store import find, read_json
from lmforge.plan import Plan
from lmforge.verbs._arguments import composed


def main(argv: Sequence[str]) -> int:
    """Print the differences."""
    words = list(argv)
    if "--" not in words:
        raise ConfigError("diff", "expects two sides", "type: diff model=nano -- model=nano optimizer.lr=1e-3, or: diff RUN -- overrides")
    at = words.index("--")
    print(diff(_plan(words[:at]), _plan(words[at + 1 :])))
    return 0


def _plan(words: list[str]) -> Plan:
    if len(words) == 1 and "=" not in words[0]:
        folder = find(words[0], "outputs")
        file = folder / "plan.json"
        if not file.is_file():
            raise ConfigError(words[0], "a step holds no plan", f"give a run: one of the folders in {Path('outputs') / 'runs'}")
        return Plan.from_json(read_json(file))
    _, experiment = composed(words)
    return compile(experiment)
