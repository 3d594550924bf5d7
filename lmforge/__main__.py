"""`python -m lmforge [verb] [flags] [overrides]`: `run` is the default verb. Each verb is a file in lmforge/verbs."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys

from lmforge import verbs
from lmforge.errors import ConfigError, LmforgeError, did_you_mean

VERBS = tuple(sorted(module.name for module in pkgutil.iter_modules(verbs.__path__) if not module.name.startswith("_")))

BRIEF = ("compare", "diff", "list", "plan")


def main(argv: list[str] | None = None) -> int:
    """Exit code of one command line: 0 done, 2 refused, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        verb, rest = split(words)
        code: int = importlib.import_module(f"lmforge.verbs.{verb}").main(rest)
    except LmforgeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is done is kept: type the same again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return code


def split(words: list[str]) -> tuple[str, list[str]]:
    """The verb and what follows it; a bare word that is no verb is refused with the nearest one."""
    if not words or words[0].startswith("-") or "=" in words[0]:
        return "run", words
    if words[0] not in VERBS:
        raise ConfigError(words[0], "unknown verb", did_you_mean(words[0], VERBS))
    return words[0], words[1:]


def process() -> int:
    """This process's own command line. Verbs that read and print make next to no garbage: it is looked for a hundred times less often, not at the end."""
    brief = sys.argv[1:2] and sys.argv[1] in BRIEF
    if brief:
        gc.set_threshold(100 * gc.get_threshold()[0])
    code = main()
    if brief:
        gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(process())
