"""The reward model as a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from lmforge.model.families import Weight
from lmforge.registry import Key, register
from lmforge.stage.base import Load, Tuning
from lmforge.stage.workload import Workload
from lmforge.step import Context


@register("stage", "reward")
class RewardModel(Tuning):
    """A reward model by Bradley-Terry on preference pairs (Ouyang et al. 2022, eq. 1), from the checkpoint with a scalar head in place of its vocabulary's."""

    consumes = ("checkpoint", "tokens:preference")
    produces = "reward_model"
    sequences_per_row = 2  # chosen and rejected

    margin: Annotated[float, Key("how far the chosen one must lead; a pair's own margin is added (Touvron et al. 2023, section 3.2.2)", ge=0)]
    centering: Annotated[float, Key("weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (Eisenstein et al. 2023)", ge=0)]

    def load(self, weights: Sequence[Weight]) -> Load:
        """The model with a scalar head for its vocabulary's."""
        whole = scalar_head(weights)
        return Load(whole) if self.adapter.trains_all else Load((*self.adapter.trainable(weights), whole[-1]), base=whole)

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """Two answers a row, and a number for each instead of logits."""
        return Workload(passes=(self.one_pass(2 * micro_rows, pairs=True, scalar=True, logits=0),), accumulation=accumulation)

    def objective(self, context: Context) -> Any:
        """-log sigmoid of the score difference."""
        from lmforge.training.objectives.reward import BradleyTerry

        return BradleyTerry(context.inputs["tokens:preference"], self.margin, self.centering)

    def run(self, context: Context) -> dict[str, Any]:
        """Train, and measure on held-out pairs."""
        from lmforge.stage.train import train_reward

        return train_reward(self, context)


def scalar_head(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """The weights of the same model as transformers' sequence classification with one label has them."""
    hidden = next(one for one in weights if one.role == "embedding").shape[-1]
    return (*(one for one in weights if one.role != "head"), Weight("score.weight", (1, hidden), 1, role="head"))
