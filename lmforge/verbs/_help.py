"""`--help`: the verbs and the groups, each in a line."""

from __future__ import annotations

import importlib
import pkgutil

from lmforge import verbs
from lmforge.compose.catalog import Catalog

HEAD = """lmforge: a config becomes a plan you can read, and the plan runs.

  python -m lmforge                                    the quickstart: a whole pipeline on real text
  python -m lmforge stage=dpo model=7b parallel=fsdp   one stage
  python -m lmforge plan stage=dpo model=7b hardware=h100x8   what it would take; nothing runs
"""


def show() -> int:
    """Print it."""
    print(HEAD)
    print("verbs:")
    for module in pkgutil.iter_modules(verbs.__path__):
        if not module.name.startswith("_"):
            about = (importlib.import_module(f"lmforge.verbs.{module.name}").__doc__ or "").splitlines()[0]
            print(f"  {module.name:<10} {about}")
    print("\ngroups (python -m lmforge list GROUP explains the options):")
    for group, options in sorted(Catalog.of().options.items()):
        print(f"  {group:<20} {' '.join(sorted(options))}")
    print("\nHydra's flags work as always: -m, --cfg job, --info defaults, --config-dir, --hydra-help, --shell-completion")
    return 0
