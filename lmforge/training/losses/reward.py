"""The loss of a reward model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float, *, centering: float) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) of scores [pairs] (Bradley and Terry 1952, as in Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    `margin` is how far apart the raters found the answers (Touvron et al. 2023, Llama 2, arXiv 2307.09288, eq. 2). `centering` times the square of
    the scores' sum keeps them near 0 (Eisenstein et al. 2023, arXiv 2312.09244), which the difference alone leaves open.
    """
    return -functional.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
