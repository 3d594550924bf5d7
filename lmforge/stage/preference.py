"""Preference losses as stages: each is a loss function and its keys; the pairs, the reference pass and the training are shared."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from lmforge.registry import Key, Node, node, register
from lmforge.stage.base import Tuning
from lmforge.stage.workload import Workload
from lmforge.step import Context, Reading, StepNode


@node
class Pairwise(Tuning):
    """A loss over (chosen, rejected) log-probs, and over the reference policy's where the stage consumes `reference`.

    Dropout is off, the model's and an adapter's: log-ratios are to a policy without it (as TRL's `disable_dropout`), and begin at 0.
    """

    consumes: ClassVar[tuple[str, ...]] = ("checkpoint", "tokens:preference", "reference")
    sequences_per_row = 2  # chosen and rejected

    def loss(self, pairs: Any) -> Any:
        """`lmforge.training.losses.preference.Pairs` to a `PairLoss`."""
        raise RuntimeError(f"{type(self).__name__} has no loss()")

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """Two answers a row, whose prompt is computed once where it can be; reference log-probs are read, not computed."""
        return Workload(passes=(self.one_pass(2 * micro_rows, pairs=self.adapter.packs),), accumulation=accumulation)

    def objective(self, context: Context) -> Any:
        """The stage's loss over its pairs."""
        from lmforge.training.objectives.preference import Preference

        return Preference(context.inputs["tokens:preference"], context.inputs.get("reference"), self.loss)


@register("stage", "dpo")
class Dpo(Pairwise):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): log-probs summed over the response, not averaged."""

    beta: Annotated[float, Key("strength of the pull towards the reference policy", gt=0)]
    label_smoothing: Annotated[float, Key("share of labels assumed flipped (conservative DPO, Mitchell 2023)", ge=0, lt=0.5)]
    length_normalized: Annotated[bool, Key("average log-probs over the response's tokens instead of summing (Lambert et al. 2024, section 5)")]

    def loss(self, pairs: Any) -> Any:
        from lmforge.training.losses.preference import dpo

        return dpo(pairs, beta=self.beta, label_smoothing=self.label_smoothing, length_normalized=self.length_normalized)


@register("stage", "ipo")
class Ipo(Pairwise):
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): the log-ratio gap is regressed to 1/(2 beta), so it cannot grow without end."""

    beta: Annotated[float, Key("the paper's tau: the gap aimed at is 1/(2 beta)", gt=0)]
    average_log_ratio: Annotated[bool, Key("average log-ratios over tokens, as TRL does; the paper sums them")]

    def loss(self, pairs: Any) -> Any:
        from lmforge.training.losses.preference import ipo

        return ipo(pairs, beta=self.beta, average_log_ratio=self.average_log_ratio)


@register("stage", "hinge")
class Hinge(Pairwise):
    """Hinge loss on the normalised likelihood margin (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023): no pull beyond a margin of 1/beta."""

    beta: Annotated[float, Key("the inverse of the margin asked for", gt=0)]

    def loss(self, pairs: Any) -> Any:
        from lmforge.training.losses.preference import hinge

        return hinge(pairs, beta=self.beta)


@register("stage", "orpo")
class Orpo(Pairwise):
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6): cross entropy of the chosen answer plus a log odds ratio; no reference policy."""

    consumes = ("checkpoint", "tokens:preference")

    beta: Annotated[float, Key("weight of the odds-ratio term, the paper's lambda", gt=0)]
    nll_over_prompt: Annotated[bool, Key("cross entropy of the prompt too, and a mean over the batch's tokens, as TRL has it")]

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """Logits at the prompt too, where its cross entropy is in the loss."""
        return Workload(passes=(self.one_pass(2 * micro_rows, pairs=self.adapter.packs, over_prompt=self.nll_over_prompt),), accumulation=accumulation)

    def objective(self, context: Context) -> Any:
        """The loss over pairs, with either cross entropy."""
        if not self.nll_over_prompt:
            return super().objective(context)
        from lmforge.training.objectives.whole_nll import WholeNll

        return WholeNll(context.inputs["tokens:preference"], None, self.loss)

    def loss(self, pairs: Any) -> Any:
        from lmforge.training.losses.preference import orpo

        return orpo(pairs, beta=self.beta)


@register("stage", "simpo")
class Simpo(Pairwise):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): average log-probs with a target margin; no reference policy."""

    consumes = ("checkpoint", "tokens:preference")

    beta: Annotated[float, Key("scale of the average log-probs", gt=0)]
    gamma: Annotated[float, Key("margin by which the chosen one must lead, in units of the scaled reward", ge=0)]

    def loss(self, pairs: Any) -> Any:
        from lmforge.training.losses.preference import simpo

        return simpo(pairs, beta=self.beta, gamma=self.gamma)


@register("stage", "kto")
class Kto(Tuning):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8) on single answers labelled good or bad; pairs count as one of each. Dropout is off."""

    consumes = ("checkpoint", "tokens:feedback", "feedback_reference")

    beta: Annotated[float, Key("strength of the pull towards the reference policy", gt=0)]
    desirable_weight: Annotated[float, Key("weight of good answers, the paper's lambda_D", gt=0)]
    undesirable_weight: Annotated[float, Key("weight of bad answers, the paper's lambda_U", gt=0)]

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """One answer a row; before, prompts with other prompts' answers without gradient, for the baseline of the whole batch."""
        mismatched = self.one_pass(micro_rows, backward=False, times=accumulation)
        return Workload(passes=(self.one_pass(micro_rows),), accumulation=accumulation, before=(mismatched,))

    def objective(self, context: Context) -> Any:
        """The loss against cached reference log-probs, with the KL baseline of the whole global batch."""
        from lmforge.training.objectives.kto import Kto as Objective

        return Objective(
            context.inputs["tokens:feedback"],
            context.inputs["feedback_reference"],
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


@register("step", "reference")
class Reference(StepNode):
    """Log-probs of every preference example under the policy before training: computed once, shared by sweep points and epochs.

    With an adapter that is the base with the adapter off, which is the checkpoint the stage starts from; no second copy is kept while training.
    """

    consumes = ("checkpoint", "tokens:preference")
    produces = "reference"

    tokens_at_once: ClassVar[int] = 16384  # in a forward pass
    most_rows: ClassVar[int] = 16

    four_bit: Annotated[dict[str, Any] | None, Key("how the base under an adapter is rounded to 4 bits; null = it is not")]

    @classmethod
    def made_for(cls, consumer: Node) -> StepNode | None:
        """On the very base that the stage trains its adapter on."""
        return cls(four_bit=consumer.adapter.four_bit) if isinstance(consumer, Tuning) else None

    @classmethod
    def rows(cls, sequences: int, length: int) -> int:
        """Rows of so many sequences in a forward pass: at most `most_rows`, and fewer of long ones."""
        return max(1, min(cls.most_rows, cls.tokens_at_once // (sequences * length)))

    def reads(self, length: int) -> Reading:
        """In float32, with logits at the answers' tokens, which are at most all."""
        sequences = 2 if self.produces == Reference.produces else 1
        return Reading(rows=sequences * self.rows(sequences, length), length=length, dtype="float32", chunked=True)

    def run(self, context: Context) -> dict[str, Any]:
        """One forward pass over the examples."""
        from lmforge.stage.reference import reference

        return reference(context, self.four_bit)


@register("step", "feedback_reference")
class FeedbackReference(Reference):
    """The same for labelled single answers, and for the mismatched ones that KTO's KL baseline is taken from."""

    consumes = ("checkpoint", "tokens:feedback")
    produces = "feedback_reference"
