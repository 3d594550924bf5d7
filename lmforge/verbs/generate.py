"""generate RUN "prompt" [output=FOLDER] [--adapter ADAPTER] [--chat] [--max-new-tokens N] [--temperature T] [--top-p P] [--seed S]: text from a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lmforge.errors import ConfigError
from lmforge.formats.store import HUB_ID
from lmforge.verbs._weights import adapter_of, weights_of

OUTPUT = "output="


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError("generate", message, 'type: generate RUN "prompt"')


def main(argv: Sequence[str]) -> int:
    """Print the text as it comes."""
    parser = _Parser(prog="lmforge generate", description=__doc__)
    parser.add_argument("checkpoint", help="a run, a step, a digest, a Hugging Face folder or an adapter's, whose base is looked for")
    parser.add_argument("prompt")
    parser.add_argument("elsewhere", nargs="?", metavar="output=FOLDER", help="as --output; may stand anywhere among these words")
    parser.add_argument("--adapter", help="a step, a digest or a PEFT folder: put this adapter onto the checkpoint, in place of one that is there")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn in the checkpoint's chat template")
    parser.add_argument("--max-new-tokens", type=int, help="default: 128, or what the context has room for")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs", help="where runs and steps are looked for")
    args = parser.parse_intermixed_args(list(argv))
    checkpoint, prompt, output = _words(args)
    folder, adapter = weights_of(checkpoint, output)
    if not Path(folder).is_dir() and HUB_ID.fullmatch(folder):
        raise ConfigError(checkpoint, "a hub id is not generated from directly", "give a folder, or a run of model=hf model.pretrained=...")
    adapter = adapter_of(args.adapter, output) if args.adapter else adapter
    from lmforge.inference.generate import generate

    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    pieces = generate(Path(folder), prompt, seed=args.seed, chat=args.chat, adapter=adapter, **sampling)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _words(args: argparse.Namespace) -> tuple[str, str, str]:
    """(checkpoint, prompt, output). Of two words none is read as an option: a prompt may well begin with `output=`."""
    words = [args.checkpoint, args.prompt, args.elsewhere]
    if args.elsewhere is None:
        return args.checkpoint, args.prompt, args.output
    at = next((index for index in (2, 0, 1) if words[index].startswith(OUTPUT)), None)
    if at is None:
        raise ConfigError(args.elsewhere, "one word too many", 'type: generate RUN "prompt"; quote a prompt of several words')
    output = words.pop(at).removeprefix(OUTPUT)
    return words[0], words[1], output
