"""Hydra's, OmegaConf's and YAML's errors, which know no keys to type instead, as problems of ours."""

from __future__ import annotations

import re
from collections.abc import Callable

from lmforge.errors import Problem

Make = Callable[[re.Match[str]], Problem]
SEE = "see 'python -m lmforge list'"
OUTSIDE = "config reads nothing from outside itself: write the value out"

KNOWN: tuple[tuple[str, Make], ...] = (
    (r"Unsupported interpolation type (\S+).*full_key: (\S+)", lambda m: Problem(m[2], f"'${{{m[1]}:...}}' is not resolved", OUTSIDE)),
    (r"(.+) full_key: (\S+)", lambda m: Problem(m[2], m[1], "write the value out")),
    (r"Ambiguous value for argument '\+*([^=]+)=(.*?)'", lambda m: Problem(m[1], f"{m[2]} are several values", f"add -m to run each, or type [{m[2]}]")),
    (r"Could not delete from config\. '(\S+)' does not exist", lambda m: Problem(m[1], "there is no such key to delete", SEE)),
    (r"Could not delete '(\S+)'", lambda m: Problem(m[1], "cannot be deleted", "choose an option instead")),
    (r"Could not override '([^'@]+)@", lambda m: Problem(m[1], "'@' names no place in the config", f"type {m[1]}=..., or stage.<name>.{m[1]}=...")),
    (r"Could not override 'reward'", lambda m: Problem("reward", "each stage has a reward of its own", "type stage.ppo.reward=... or stage.grpo.reward=...")),
    (r"Could not (?:override|append to) '([^']+)'", lambda m: Problem(m[1], "unknown key", SEE)),
    (r"In '(\S+)': Could not (?:find|load) '(\S+)'", lambda m: Problem(m[1], f"there is no option '{m[2]}'", SEE)),
    (r"Error merging override \+*([^=\s]+)=(\S*)", lambda m: Problem(m[1], f"{m[2]!r} is not valid", SEE)),
)


def problem(error: Exception) -> Problem:
    """One line of ours for what a library said."""
    if isinstance(error, RecursionError):
        return Problem("conf", "a defaults list leads back to itself", "mend the option's 'defaults'")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    for pattern, make in KNOWN:
        if found := re.search(pattern, text):
            return make(found)
    return Problem("conf", text[:240] or type(error).__name__, SEE)
