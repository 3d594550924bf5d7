"""What `stage=` may name. A stage takes from the root groups whatever its fields are annotated with.

`consumes` and `produces` are artifact kinds; the compiler wires stages by them, so a new stage needs no compiler edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from lmforge.codec import digest
from lmforge.data.nodes import Data
from lmforge.errors import Problem
from lmforge.model.nodes import Model
from lmforge.optimizer.nodes import Optimizer
from lmforge.parallel.nodes import Parallel
from lmforge.precision.nodes import Precision
from lmforge.registry import Key, Node, node, register
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
        return next((kind.partition(":")[2] for kind in self.consumes if kind.startswith("tokens:")), "")


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

    def objective(self, context: Context) -> Any:
        """The loss over this stage's tokens, as `lmforge.training` wants it (torch)."""
        raise RuntimeError(f"{type(self).__name__} has no objective()")

    def run(self, context: Context) -> dict[str, Any]:
        """Train from the checkpoint given, or from scratch where there is none."""
        from lmforge.stage.train import train

        return train(self, context)


@register("stage", "pretrain")
class Pretrain(TrainingStage):
    """Next-token prediction on packed documents with a document mask (Radford et al. 2019); from scratch, or on from a pretrained stage."""

    consumes = ("tokenizer", "tokens:text")
    follows = ("pretrain",)
    model: Annotated[Model, Key("the architecture", identity=False)]

    def content(self, _cache: Any) -> str:
        """The architecture by its config.json, however the model node spells it."""
        return digest(self.model.config())

    def objective(self, context: Context) -> Any:
        """Cross entropy over every token of the packed stream."""
        from lmforge.training.objectives.causal_lm import CausalLM

        return CausalLM(context.inputs["tokens:text"], self.row_tokens)


@register("stage", "sft")
class Sft(TrainingStage):
    """Supervised fine-tuning on conversations, loss on assistant tokens only (Ouyang et al. 2022, section 3.5)."""

    consumes = ("checkpoint", "tokens:chat")

    def objective(self, context: Context) -> Any:
        """Cross entropy over assistant tokens of packed conversations."""
        from lmforge.training.objectives.causal_lm import CausalLM

        return CausalLM(context.inputs["tokens:chat"], self.row_tokens)


@register("stage", "dpo")
class Dpo(TrainingStage):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): log-probs summed over the response, not averaged."""

    consumes = ("checkpoint", "tokens:preference", "reference")
    sequences_per_row = 2  # chosen and rejected
    beta: Annotated[float, Key("strength of the pull towards the reference policy", gt=0)]
    label_smoothing: Annotated[float, Key("share of labels assumed flipped (conservative DPO, Mitchell 2023)", ge=0, lt=0.5)]

    def objective(self, context: Context) -> Any:
        """The sigmoid loss against cached reference log-probs."""
        from lmforge.training.objectives.dpo import Dpo as Objective

        return Objective(context.inputs["tokens:preference"], context.inputs["reference"], beta=self.beta, label_smoothing=self.label_smoothing)


@register("step", "reference")
class Reference(StepNode):
    """Log-probs of every preference example under the policy before training: computed once, shared by sweep points and epochs."""

    consumes = ("checkpoint", "tokens:preference")
    produces = "reference"

    def run(self, context: Context) -> dict[str, Any]:
        """One forward pass over the pairs."""
        from lmforge.stage.train import reference

        return reference(context)
