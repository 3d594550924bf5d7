"""What `stage=` may name: importing this registers every stage. A stage is one class in one of these files, and one YAML in conf/stage."""

from __future__ import annotations

from lmforge.stage.base import Budget, Load, Stage, TrainingStage, Tuning
from lmforge.stage.language import Pretrain, Sft
from lmforge.stage.preference import Dpo, FeedbackReference, Hinge, Ipo, Kto, Orpo, Pairwise, Reference, Simpo
from lmforge.stage.reinforcement import Grpo, Ppo, Reinforcement
from lmforge.stage.reward import RewardModel
from lmforge.stage.sampling import Sample

__all__ = [
    "Budget", "Dpo", "FeedbackReference", "Grpo", "Hinge", "Ipo", "Kto", "Load", "Orpo", "Pairwise", "Ppo", "Pretrain", "Reference", "Reinforcement",
    "RewardModel", "Sample", "Sft", "Simpo", "Stage", "TrainingStage", "Tuning",
]  # fmt: skip
