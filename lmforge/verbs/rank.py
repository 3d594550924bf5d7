"""rank RUN [output=FOLDER]: answers of a sample step ranked on a local page, or --by a reward or a judge, into preference rows.

rank RUN [--rater NAME] [--port N] [--no-browser]   a page for people: by keyboard, every click saved at once, goes on where it stopped
rank RUN --by reward_model=STEP                     a trained reward model: the highest score against the lowest
rank RUN --by REWARD [reward.KEY=VALUE...]          an option of the group reward, such as python_parses or length
rank RUN --by judge=CHECKPOINT                      a language model that reads two answers in both orders
rank RUN --agreement                                how far raters agree, with Cohen's kappa
rank RUN --export FILE.jsonl [--raters A,B]         preference rows by majority; data=text data.path=FILE.jsonl takes them

What is collected lies in <output>/rankings/<step>: ratings.jsonl (every click), preference.jsonl (made of people's), preference-<method>.jsonl.
"""

from __future__ import annotations

import argparse
import math
import re
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmforge.errors import ConfigError, did_you_mean
from lmforge.formats import samples as format_
from lmforge.formats import store
from lmforge.formats.samples import Sampled
from lmforge.ranking import pairs
from lmforge.ranking.ratings import Ratings, name_complaint

OUTPUT, KEYS = "output=", "reward."
USAGE = "type: rank RUN [--by METHOD] [--export FILE.jsonl] [--agreement]"
JUDGE, REWARD_MODEL = "judge", "reward_model"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError("rank", message, USAGE)


@dataclass
class Ranking:
    """The samples of one step and what was said of them."""

    step: Path
    samples: list[Sampled]
    ratings: Ratings

    @property
    def folder(self) -> Path:
        """Beside the steps, for a finished step never changes."""
        return self.ratings.file.parent

    @property
    def rankable(self) -> list[Sampled]:
        """Prompts with something to choose from."""
        return [one for one in self.samples if len(one.answers) > 1]


def main(argv: Sequence[str]) -> int:
    """Rank, or say how far raters agree, or write the rows."""
    args = _parsed(argv)
    ranking = opened(args.run, args.output)
    wanted = _known(args.raters, ranking.ratings.raters) if args.raters else None
    method = _by(args, ranking) if args.by else None
    if not (args.by or args.agreement or args.export):
        _page(ranking, args)
    if args.agreement:
        found = list(pairs.agreements(ranking.samples, ranking.ratings))
        print("\n".join(map(str, found)) or f"no two raters have judged the same pair yet (raters: {', '.join(ranking.ratings.raters) or 'none'})")
    if args.export or not args.agreement:
        _write(ranking, method, wanted, Path(args.export) if args.export else None)
    return 0


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="lmforge rank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run, a step or a digest of stage=sample")
    parser.add_argument("keys", nargs="*", metavar="reward.KEY=VALUE", help="with --by: another value of a key of that reward")
    parser.add_argument("--output", default="outputs", help="where runs and steps are looked for; output=FOLDER too")
    parser.add_argument("--rater", help="who ranks; the page asks where it is not given")
    parser.add_argument("--port", type=int, default=0, help="port of the page; default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    parser.add_argument("--by", metavar="METHOD", help="reward_model=STEP, judge=CHECKPOINT, or an option of the group reward")
    parser.add_argument("--min-margin", type=float, default=0.0, help="with --by: scores nearer than this are a tie")
    parser.add_argument("--agreement", action="store_true", help="print how far every two raters agree")
    parser.add_argument("--export", metavar="FILE.jsonl", help="write the preference rows there too")
    parser.add_argument("--raters", metavar="A,B", help="whose rankings count; default: the method's with --by, else people's, else methods'")
    words = [word for word in argv if not word.startswith(OUTPUT)]
    args = parser.parse_intermixed_args(words)
    args.output = next((word.removeprefix(OUTPUT) for word in argv if word.startswith(OUTPUT)), args.output)
    if args.raters and not args.export:
        raise ConfigError("--raters", "says whose rankings are exported", "add --export FILE.jsonl")
    for word in args.keys:
        if not word.startswith(KEYS) or "=" not in word or not args.by or args.by.startswith(JUDGE):
            raise ConfigError(word, "unknown word", "with --by REWARD type reward.KEY=VALUE")
    if not math.isfinite(args.min_margin) or args.min_margin < 0:
        raise ConfigError("--min-margin", f"{args.min_margin} must be a finite number >= 0")
    if args.rater is not None and (why := name_complaint(args.rater)):
        raise ConfigError("--rater", why)
    if not 0 <= args.port < 65536:
        raise ConfigError("--port", f"{args.port} is not a port", "leave it out to get a free one")
    return args


def opened(reference: str, output: str) -> Ranking:
    """The samples of a run or a step, with their ratings; ConfigError where it drew none."""
    step = _step(store.find(reference, output), reference, format_.FILE, "samples", "give a run of stage=sample")
    samples = format_.read(step / "samples")
    return Ranking(step, samples, Ratings(step.parent.parent / "rankings" / step.name / "ratings.jsonl", samples))


def _step(folder: Path, reference: str, file: str, kind: str, instead: str) -> Path:
    """The step that made an artifact: the folder itself, or the last such step of a run."""
    found = [folder]
    if (folder / store.RUN_FILE).is_file():
        found = [folder.parent.parent / "steps" / name for name in store.read_json(folder / store.RUN_FILE)["steps"]]
    made = [one for one in found if (one / kind / file).is_file()]
    if not made:
        raise ConfigError(reference, f"made no {kind}", instead)
    return made[-1]


def _known(words: str, raters: Sequence[str]) -> list[str]:
    wanted = [word.strip() for word in words.split(",")]
    for word in wanted:
        if word not in raters:
            raise ConfigError("--raters", f"{word!r} has ranked nothing", did_you_mean(word, raters))
    return list(dict.fromkeys(wanted))


def _page(ranking: Ranking, args: argparse.Namespace) -> None:
    from lmforge.ranking.server import Page, Server

    if not ranking.rankable:
        raise ConfigError(args.run, "no prompt has two different answers, so there is nothing to rank", "draw more, at a higher temperature")
    with Server(Page(ranking.samples, ranking.ratings, args.rater), args.port) as server:
        print(f"{server.url}\n{len(ranking.rankable):,} prompts to rank; every click is saved at once; Ctrl-C ends it", flush=True)
        if not args.no_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
    ranking.ratings.refresh()


def _by(args: argparse.Namespace, ranking: Ranking) -> str:
    """Rank by a method; returns its name as a rater."""
    from rich.console import Console
    from rich.progress import Progress

    name, _, given = args.by.partition("=")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(name, total=None)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        rater, scores = _judged(given, ranking, args.output, show) if name == JUDGE else _rewarded(name, given, args, ranking, show)
    from lmforge.ranking.machine import rank

    print(f"{rater}: {rank(ranking.rankable, scores, ranking.ratings, rater, args.min_margin)}")
    return rater


def _judged(checkpoint: str, ranking: Ranking, output: str, show: Any) -> tuple[str, Any]:
    if not checkpoint:
        raise ConfigError("--by judge", "which checkpoint?", "type: --by judge=CHECKPOINT")
    folder = Path(store.checkpoint_of(checkpoint, output))
    if not folder.is_dir():
        raise ConfigError(checkpoint, "a hub id does not judge directly", "give a folder, or a run of model=hf model.pretrained=...")
    from lmforge.ranking.judge import Judge

    return f"judge:{_name(folder)}", Judge(folder).scores(ranking.rankable, show)


def _rewarded(name: str, given: str, args: argparse.Namespace, ranking: Ranking, show: Any) -> tuple[str, Any]:
    inputs: dict[str, Path] = {}
    if name == REWARD_MODEL:
        if not given:
            raise ConfigError("--by reward_model", "which one?", "type: --by reward_model=STEP")
        inputs[REWARD_MODEL] = _reward_model(given, args.output)
    elif given:
        raise ConfigError(f"--by {name}={given}", "a reward's name stands alone", f"type: --by {name}; or reward_model=STEP, judge=CHECKPOINT")
    reward = _reward(name, args.keys)
    if lacking := set(reward.takes()) - set(inputs):
        raise ConfigError(f"--by {name}", f"needs a {', '.join(sorted(lacking))}", "type: --by reward_model=STEP")
    from lmforge.ranking.machine import by_reward

    rater = " ".join([f"reward_model:{_name(inputs[REWARD_MODEL])}" if inputs else f"reward:{name}", *(word.removeprefix(KEYS) for word in args.keys)])
    tokenizer = inputs.get(REWARD_MODEL, ranking.step / "samples" / "tokenizer")
    return rater, by_reward(ranking.rankable, reward.open(inputs), tokenizer, show)


def _reward_model(reference: str, output: str) -> Path:
    folder = Path(reference)
    if (folder / "config.json").is_file():
        return folder
    return _step(store.find(reference, output), reference, "config.json", REWARD_MODEL, "give a run of stage=reward") / REWARD_MODEL


def _reward(name: str, words: Sequence[str]) -> Any:
    """The reward with the values of its YAML, or those typed; a trained one is the option that takes a reward model."""
    import yaml

    from lmforge.codec import decode
    from lmforge.compose.catalog import Catalog
    from lmforge.compose.layers import merge
    from lmforge.reward.nodes import Reward
    from lmforge.verbs.list import tree

    catalog = Catalog.of()
    options = catalog.options.get("reward", {})
    option = "model" if name == REWARD_MODEL else name
    if option not in options:
        raise ConfigError(f"--by {name}", "unknown method", did_you_mean(name, [*options, JUDGE, REWARD_MODEL]))
    values = tree(catalog, "reward", option)
    for word in words:
        key, _, text = word.removeprefix(KEYS).partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{KEYS}{key}", f"{text!r} is not a value", "quote it") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return decode(Reward, values, "reward")


def _name(folder: Path) -> str:
    """A step's own name for a folder within it; else the folder's."""
    folder = folder.resolve()
    return folder.parent.name if (folder.parent / store.STEP_FILE).is_file() else folder.name


def _write(ranking: Ranking, method: str | None, wanted: list[str] | None, export: Path | None) -> None:
    """The rows of whoever counts, into the ranking's folder and where they are exported to. A method has a file of its own there."""
    raters = wanted or ([method] if method else pairs.heard(ranking.ratings))
    found = pairs.preferences(ranking.samples, ranking.ratings, raters)
    own = "-".join(["preference", *([re.sub(r"[^\w.-]+", "-", method)] if method else [])])
    files = [*([] if wanted else [ranking.folder / f"{own}.jsonl"]), *([export] if export else [])]
    try:
        for file in files:
            pairs.write(found.rows, file)
    except OSError as error:
        raise ConfigError(str(error.filename or export), f"cannot be written: {error.strerror}", "give a file in a folder that you may write") from error
    print(f"{found}\nraters: {', '.join(raters) or 'none yet'}\nwritten: {', '.join(map(str, files))}")
