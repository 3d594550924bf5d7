"""merge ADAPTER OUT [output=FOLDER] [--base CHECKPOINT]: a trained adapter and its base as one Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lmforge.errors import ConfigError
from lmforge.verbs._weights import adapter_of, base_of

OUTPUT = "output="


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError("merge", message, "type: merge ADAPTER OUT [--base CHECKPOINT]")


def main(argv: Sequence[str]) -> int:
    """Write the folder and say what it is."""
    parser = _Parser(prog="lmforge merge", description=__doc__)
    parser.add_argument("adapter", help="a run, a step or a digest that trained an adapter, or a PEFT folder")
    parser.add_argument("out", help="the folder to write; it must not exist")
    parser.add_argument("--base", help="the checkpoint it was trained on: a run, a step, a digest or a folder; looked for where it is not given")
    parser.add_argument("--output", default="outputs", help="where runs and steps are looked for; also output=FOLDER")
    words = [f"--output={word.removeprefix(OUTPUT)}" if word.startswith(OUTPUT) else word for word in argv]
    args = parser.parse_intermixed_args(words)
    out = Path(args.out)
    if out.exists():
        raise ConfigError(args.out, "is there already", "give a folder that does not exist yet")
    adapter = adapter_of(args.adapter, args.output)
    base = base_of(adapter, args.output, args.base)
    from lmforge.inference.merge import merge_folders

    made = merge_folders(base, adapter, out)
    how = "merged into its base" if made["merged"] else "beside its base: a soft prompt cannot be merged, open it with this program"
    print(f"{out}: {adapter} {how} {base}")
    return 0
