"""What a config may name in `eval`: how a checkpoint is measured."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lmforge.codec import digest
from lmforge.errors import Problem
from lmforge.registry import Key, node, register
from lmforge.step import Context, Reading, StepNode

AFTER = Key("which checkpoints of the pipeline are measured: every stage's, or the last one's only")


@node
class Eval(StepNode):
    """A checkpoint to metrics. `produces` is empty where nothing is measured, and then there is no step."""

    group: ClassVar[str] = "eval"
    consumes: ClassVar[tuple[str, ...]] = ("checkpoint",)
    produces: ClassVar[str] = "metrics"

    def measures(self, last: bool) -> bool:
        """Whether a checkpoint of the pipeline is measured; `last` = no later stage follows it."""
        return last

    def later(self) -> Eval:
        """The node for every checkpoint after the first: baselines that would come out the same are not measured again."""
        return self


@register("eval", "none")
class NoEval(Eval):
    """No evaluation."""

    consumes: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = ""

    def measures(self, last: bool) -> bool:
        return False


@register("eval", "perplexity")
class Perplexity(Eval):
    """Held-out perplexity by token (torchmetrics) of text and of assistants' answers, and preference accuracy, on what the root data holds out.

    Accuracy is the share of pairs with log p(chosen) > log p(rejected), summed over the answer and its end token; a tie counts half.
    """

    consumes: ClassVar[tuple[str, ...]] = ("checkpoint", "tokens:text", "tokens:chat", "tokens:preference")

    after: Annotated[Literal["all", "last"], AFTER]
    batch_tokens: Annotated[int, Key("tokens in one forward pass, padding included", unit="tokens", ge=1, identity=False)]
    max_tokens: Annotated[int | None, Key("held-out tokens to read, in rows spread evenly over the split; null = all", unit="tokens", ge=1)]
    max_pairs: Annotated[int | None, Key("held-out preference pairs to read, spread evenly; null = all", unit="pairs", ge=1)]
    bigram: Annotated[bool, Key("measure an interpolated bigram model on the same held-out tokens too")]
    untrained: Annotated[bool, Key("measure the same architecture with random weights too")]
    sample_prompt: Annotated[str | None, Key("text the sample continues; null = the beginning of a held-out document")]
    sample_prompt_tokens: Annotated[int, Key("how much of the held-out document the sample starts from", unit="tokens", ge=1)]
    sample_tokens: Annotated[int, Key("length of the sample of generated text; 0 = none", unit="tokens", ge=0)]
    sample_temperature: Annotated[float, Key("temperature of the sample; 0 = greedy", ge=0)]

    def measures(self, last: bool) -> bool:
        return last or self.after == "all"

    def later(self) -> Perplexity:
        return dataclasses.replace(self, bigram=False, untrained=False)

    def reads(self, length: int) -> Reading:
        return Reading(rows=max(1, self.batch_tokens // length), length=length, beside=self.untrained)

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.eval.measure import measure

        return measure(self, context)


@register("eval", "lm_eval")
class LmEval(Eval):
    """EleutherAI's lm-evaluation-harness on the checkpoint: installed tasks by name, a folder of yours, or ours on the run's own held-out data."""

    consumes: ClassVar[tuple[str, ...]] = ("checkpoint", "corpus")
    needs = {"lm_eval": "lm-eval", "accelerate": "lm-eval"}  # noqa: RUF012

    after: Annotated[Literal["all", "last"], AFTER]
    tasks: Annotated[tuple[str, ...], Key("task, group or tag names; heldout_code and heldout_pairs are ours and need no network")]
    num_fewshot: Annotated[int | None, Key("examples in the prompt; null = what each task says", unit="examples", ge=0)]
    limit: Annotated[float | None, Key("documents a task: a count, or a share below 1; null = all", gt=0)]
    batch_size: Annotated[int | str, Key("sequences in one forward pass, or auto", identity=False)]
    include_path: Annotated[str | None, Key("a folder of task YAMLs; no Python in it, and no !function; its content counts, not its path", identity=False)]
    apply_chat_template: Annotated[bool, Key("put each prompt into the checkpoint's chat template")]

    def measures(self, last: bool) -> bool:
        return last or self.after == "all"

    def content(self, cache: Path | None) -> str:
        """The task folder by its files."""
        if self.include_path is None:
            return ""
        root = Path(self.include_path)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return digest([[path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])

    def check(self, where: str) -> Iterator[Problem]:
        from lmforge.eval.taskfolder import problems

        if not self.tasks:
            yield Problem(f"{where}.tasks", "is empty", "name a task, such as heldout_code, or use eval=none")
        for name in self.tasks:
            if "/" in name or name.endswith((".yaml", ".yml")):  # the harness would open it, and import what it names
                yield Problem(f"{where}.tasks", f"{name!r} is a path", "name a task, and give its folder as include_path")
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            yield Problem(f"{where}.limit", f"{self.limit} is neither a count nor a share below 1", "write a whole number of documents, or a share such as 0.1")
        bad = self.batch_size < 1 if isinstance(self.batch_size, int) else self.batch_size != "auto"
        if bad:
            yield Problem(f"{where}.batch_size", f"{self.batch_size!r} is not a batch size", "write a number >= 1, or auto")
        if self.include_path is not None:
            yield from problems(Path(self.include_path), f"{where}.include_path")

    def reads(self, length: int) -> Reading:
        """One row, as long as the model's context: how many a batch has, and how long they are, is the tasks' to say."""
        return Reading(rows=1, length=length)

    def preflight(self) -> None:
        from lmforge.eval.harness import check_names

        check_names(self)

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.eval.harness import evaluate

        return evaluate(self, context)
