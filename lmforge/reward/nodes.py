"""What a config may name in `reward`: what an answer is worth. Rules that can be checked, a trained reward model, and weighted sums of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lmforge.errors import Problem
from lmforge.registry import Key, Node, register

if TYPE_CHECKING:
    from lmforge.reward.checked import Checked


@dataclass(frozen=True)
class Episodes:
    """Answers to prompts, one of each list a row."""

    prompts: list[str]  # decoded, without special tokens
    answers: list[str]  # decoded, without special tokens
    references: list[str | None]  # the right answers, where the data knows them
    ids: list[list[int]]  # prompt and answer as the policy saw them, the end token included
    starts: list[int]  # ids[row][starts[row]:] is the answer


# One value a row. `components` of it, where it has them, are the parts of its last values by name; `check(references, split)`, where it has one, refuses a
# split's references [prompts] that it could not score with, before the first answer is written.
Scorer = Callable[[Episodes], Sequence[float]]


class Reward(Node):
    """What an answer is worth. An option implements `scorer`; whoever uses it calls `open`, which looks at every value."""

    group = "reward"

    def takes(self) -> tuple[str, ...]:
        """Artifact kinds that `open` needs."""
        return ()

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        """The function itself; `inputs` holds what `takes` names, `where` is how errors name this reward."""
        raise NotImplementedError

    def open(self, inputs: Mapping[str, Path], where: str = "reward") -> Checked:
        """Ready to score: RunError from a call that gives NaN, an infinite value or not one value a row."""
        from lmforge.reward.checked import Checked

        return Checked(f"{where}={self.type}", self.scorer(inputs, where))


@register("reward", "model")
class RewardModel(Reward):
    """A trained reward model's score of prompt and answer at the last token (Ouyang et al. 2022, section 3.5), as (score - shift) * scale."""

    batch_size: Annotated[int, Key("answers in one forward pass", "answers", ge=1, identity=False)]
    shift: Annotated[float, Key("taken from each score, such as its mean over the training answers")]
    scale: Annotated[float, Key("each score is multiplied by this; negative turns it round")]

    def takes(self) -> tuple[str, ...]:
        return ("reward_model",)

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        from lmforge.reward.model import ModelScorer

        return ModelScorer(inputs["reward_model"], self.batch_size, self.shift, self.scale)


@register("reward", "python_parses")
class PythonParses(Reward):
    """1 where the prompt's last definition goes on to parse as Python with the answer as its body, else 0. Nothing is executed.

    Where the prompt holds no definition, the answer by itself. `pass` and statements of literals alone (`1, 2, 3`, a string) count for nothing.
    """

    min_nodes: Annotated[
        int,
        Key("fewest statements and expressions in the answer, those of bare literals not counted, so that a trivial one earns nothing", "syntax nodes", ge=1),
    ]
    max_chars: Annotated[int, Key("a longer answer earns nothing; it bounds the work of the parser", "characters", ge=1)]
    trimmed: Annotated[bool, Key("give the answer's first line the indent of the body; for chat templates that trim answers")]

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        from lmforge.reward.python import nodes_of_answer

        def score(episodes: Episodes) -> list[float]:
            pairs = zip(episodes.prompts, episodes.answers, strict=True)
            return [float(len(answer) <= self.max_chars and nodes_of_answer(prompt, answer, self.trimmed) >= self.min_nodes) for prompt, answer in pairs]

        return score


@register("reward", "exact_match")
class ExactMatch(Reward):
    """1 where what is extracted from the answer equals what is extracted from the reference, else 0; numbers by their value (GSM8K, Cobbe et al. 2021).

    Every prompt needs a reference that holds what is extracted; they are looked at before training.
    """

    extract: Annotated[Literal["whole", "last_line", "last_number", "boxed"], Key("what counts: all of it, its last line, its last number, or \\boxed{...}")]
    ignore_case: Annotated[bool, Key("whether upper and lower case are the same")]

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        from lmforge.reward.match import Matches

        return Matches(self.extract, self.ignore_case, f"{where}={self.type}")


@register("reward", "regex")
class Regex(Reward):
    """1 where the pattern is found in the answer, else 0. RE2 (Cox 2007), whose time is linear in the answer whatever the pattern."""

    pattern: Annotated[str, Key("RE2 syntax: Python's without lookaround and backreferences; (?s) lets . match a newline")]
    ignore_case: Annotated[bool, Key("whether upper and lower case are the same")]

    def check(self, where: str) -> Iterator[Problem]:
        from lmforge.reward.match import complaint

        if reason := complaint(self.pattern):
            yield Problem(f"{where}.pattern", reason, "RE2 has no lookaround and no backreferences")

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        from lmforge.reward.match import found

        return lambda episodes: found(self.pattern, self.ignore_case, episodes.answers)


@register("reward", "length")
class Length(Reward):
    """1 at the wanted length of the answer, falling linearly on both sides to 0 at nothing and at twice the length."""

    target: Annotated[int, Key("the wanted length, in `unit`", ge=1)]
    unit: Annotated[Literal["tokens", "characters"], Key("what is counted; tokens include the end token")]

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        def score(episodes: Episodes) -> list[float]:
            tokens = [len(ids) - start for ids, start in zip(episodes.ids, episodes.starts, strict=True)]
            counts = tokens if self.unit == "tokens" else [len(answer) for answer in episodes.answers]
            return [max(0.0, 1 - abs(count - self.target) / self.target) for count in counts]

        return score


@register("reward", "repetition")
class Repetition(Reward):
    """The share of the answer's n-grams of words that are distinct (distinct-n, Li et al. 2016): 1 repeats nothing; 0 for an empty answer."""

    n: Annotated[int, Key("words and signs in an n-gram", ge=1)]

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        from lmforge.reward.match import distinct

        return lambda episodes: [distinct(answer, self.n) for answer in episodes.answers]


@register("reward", "sum")
class Sum(Reward):
    """A weighted sum of rewards, each of which is logged under its own name, before its weight."""

    rewards: Annotated[dict[str, Reward], Key("any reward options, under names of your own")]
    weights: Annotated[dict[str, float], Key("each reward's weight; negative makes it a penalty")]

    def check(self, where: str) -> Iterator[Problem]:
        if not self.rewards:
            yield Problem(f"{where}.rewards", "is empty", "name at least one")
        for name in sorted(self.rewards.keys() ^ self.weights.keys()):
            instead = f"add weights.{name}" if name in self.rewards else f"rewards has: {', '.join(self.rewards)}"
            yield Problem(f"{where}.weights.{name}", "each reward has one weight, and each weight a reward", instead)
        for name, weight in self.weights.items():
            if weight == 0:
                yield Problem(f"{where}.weights.{name}", "is 0", "leave the reward out instead")

    def takes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for name in sorted(self.rewards) for kind in self.rewards[name].takes()))

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
        from lmforge.reward.checked import Weighted

        return Weighted({name: self.rewards[name].open(inputs, f"{where}.rewards.{name}") for name in sorted(self.rewards)}, self.weights)
