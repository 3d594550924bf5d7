"""What every stage is. A stage takes from the root groups whatever its fields are annotated with.

`takes` and `makes` are artifact kinds; the compiler wires stages by them, so a new stage needs no compiler edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from lmforge.adapter.nodes import Adapter
from lmforge.data.nodes import Data
from lmforge.errors import Problem
from lmforge.model.families import Weight
from lmforge.optimizer.nodes import Optimizer
from lmforge.parallel.nodes import Parallel
from lmforge.precision.nodes import Precision
from lmforge.registry import Key, Node, node
from lmforge.stage.workload import Pass, Workload
from lmforge.step import Context, StepNode


@node
class Budget(Node):
    """How much to train: exactly one of four; the others are null."""

    exactly_one = True
    tokens: Annotated[int | None, Key("tokens seen in training", "tokens", gt=0)]
    steps: Annotated[int | None, Key("optimizer steps", "steps", gt=0)]
    flops: Annotated[float | None, Key("training FLOPs by 6N + 6LdT per token", "FLOP", gt=0)]
    tokens_per_parameter: Annotated[float | None, Key("tokens as a multiple of the model's total parameters (Hoffmann et al. 2022: about 20)", "tokens", gt=0)]

    def check(self, where: str) -> Iterator[Problem]:
        """Exactly one of the four."""
        given = [name for name in ("tokens", "steps", "flops", "tokens_per_parameter") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are set" if given else "no budget is set"
            yield Problem(where, said, "give exactly one of tokens, steps, flops, tokens_per_parameter")


class Stage(StepNode):
    """A step of the pipeline that a user types."""

    group = "stage"
    follows: ClassVar[tuple[str, ...]] = ()  # stage types it may come after; empty: any

    @property
    def view(self) -> str:
        """The data view the stage reads, by its `tokens:<view>` input; empty where it reads none."""
        return next((kind.partition(":")[2] for kind in self.takes() if kind.startswith("tokens:")), "")

    def example_tokens(self, context_tokens: int) -> int:
        """The longest example of its view, for a model of that context."""
        return context_tokens


@dataclass(frozen=True)
class Load:
    """The weights a training stage holds on its devices: those with gradients and optimizer states, and those without.

    `base` is what lies under an adapter, spread with what is trained; `frozen` are models beside it, whole on every device.
    """

    trained: tuple[Weight, ...]
    frozen: tuple[Weight, ...] = ()
    base: tuple[Weight, ...] = ()


def parameters(weights: Iterable[Weight]) -> int:
    """How many numbers they hold."""
    return sum(math.prod(one.shape) * one.count for one in weights)


@node
class TrainingStage(Stage):
    """A stage that changes weights: one row of its batch is `sequences_per_row` sequences of `seq_len` tokens."""

    produces = "checkpoint"
    sequences_per_row: ClassVar[int] = 1
    seed: Annotated[int, Key("seed of the weights' initialisation, of the data order and of dropout", ge=0)]
    init_from: Annotated[
        str | None, Key("weights to start from: a folder, a hub id or a run; null = the stage before it, or the weights the model names", identity=False)
    ]
    seq_len: Annotated[int | None, Key("tokens in a sequence; null = the model's context", "tokens", ge=2)]
    budget: Annotated[Budget, Key("how much to train")]
    data: Annotated[Data, Key("where the examples come from; the content counts, not the path", identity=False)]
    optimizer: Annotated[Optimizer, Key("optimizer, schedule and batch")]
    precision: Annotated[Precision, Key("number formats")]
    parallel: Annotated[Parallel, Key("devices and sharding")]
    log_every: Annotated[int, Key("how often metrics are logged", "optimizer steps", gt=0, identity=False)]
    save_every_s: Annotated[float, Key("how often a resumable state is written", "seconds", gt=0, identity=False)]

    @property
    def row_tokens(self) -> int:
        """Tokens in one row; `seq_len` is set once the plan is resolved."""
        assert self.seq_len is not None
        return self.seq_len * self.sequences_per_row

    @property
    def positions(self) -> int:
        """Tokens that the model sees before each sequence, beside its own."""
        return 0

    def example_tokens(self, context_tokens: int) -> int:
        """Its sequence length."""
        return self.length(context_tokens)

    def length(self, context_tokens: int) -> int:
        """Tokens in a sequence: `seq_len`, or the model's context."""
        return self.seq_len or context_tokens

    def account(self, rows: int, steps: int) -> Iterator[str]:
        """Lines of arithmetic beyond the batch's, for people; PlanError where the stage's own numbers do not go together. `rows` are those of a step."""
        yield from ()

    def load(self, weights: Sequence[Weight]) -> Load:
        """What it holds of a model with these weights: all of them, trained."""
        return Load(tuple(weights))

    def base_bytes(self, weights: Sequence[Weight]) -> int:
        """Bytes of the weights under an adapter, all devices together."""
        return 0

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """What an optimizer step runs on one data-parallel rank; here next-token prediction on packed rows, which memory and time are predicted from."""
        tokens = self.row_tokens
        rows = Pass(model="trained", sequences=micro_rows, length=tokens, logits=tokens, backward=True, packed=True)
        return Workload(passes=(rows,), accumulation=accumulation)

    def objective(self, context: Context) -> Any:
        """The loss over this stage's tokens, as `lmforge.training` wants it (torch)."""
        raise RuntimeError(f"{type(self).__name__} has no objective()")

    def run(self, context: Context) -> dict[str, Any]:
        """Train from the checkpoint given, or from scratch where there is none."""
        from lmforge.stage.train import train

        return train(self, context)


@node
class Tuning(TrainingStage):
    """A training stage that starts from weights, and may train an adapter on them instead of the weights themselves."""

    adapter: Annotated[Adapter, Key("what is trained: the weights, or an adapter on them")]

    def makes(self) -> str:
        """A checkpoint, or the adapter alone: the compiler merges it where a checkpoint is needed."""
        return self.produces if self.adapter.trains_all or self.produces != "checkpoint" else "adapter"

    @property
    def positions(self) -> int:
        """A soft prompt's."""
        return self.adapter.positions

    def length(self, context_tokens: int) -> int:
        """`seq_len`, or what a soft prompt leaves of the model's context."""
        return self.seq_len or context_tokens - self.positions

    def load(self, weights: Sequence[Weight]) -> Load:
        """All weights trained, or the adapter's on a frozen base."""
        return Load(tuple(self.adapter.trainable(weights)), base=() if self.adapter.trains_all else tuple(weights))

    def base_bytes(self, weights: Sequence[Weight]) -> int:
        """The adapter knows, for it may quantize them."""
        return self.adapter.frozen_bytes(self.load(weights).base, self.precision.param_bytes)

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """Packed rows, or one example a row behind a soft prompt."""
        return Workload(passes=(self.one_pass(micro_rows, packed=self.adapter.packs),), accumulation=accumulation)

    def one_pass(self, sequences: int, **more: Any) -> Pass:
        """Forward and backward of what is trained over so many sequences of `seq_len` tokens, and what a soft prompt puts before each."""
        assert self.seq_len is not None
        return Pass(**{"model": "trained", "sequences": sequences, "length": self.seq_len + self.positions, "logits": self.seq_len, "backward": True, **more})
