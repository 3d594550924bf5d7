"""The options of `optimizer`: real libraries behind typed keys, and the bytes each keeps per parameter.

`build` returns torch optimizers whose parameter groups hold the peak learning rate; the training loop multiplies it by the schedule's factor.
Weight decay applies to matrices only, see `groups.decays`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from lmforge.errors import Problem, RunError
from lmforge.optimizer.groups import Named, numel, role, split_decay
from lmforge.optimizer.schedule import Constant, Cosine, Linear, Schedule, Wsd
from lmforge.registry import Key, Node, node, register

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer

__all__ = ["Adafactor", "Adam", "AdamW", "AdamW8bit", "Constant", "Cosine", "Linear", "Momentum", "Muon", "Optimizer", "Schedule", "Sgd", "Wsd"]

FP32_BYTES = 4
BNB_BLOCK = 256  # bitsandbytes: elements that share one fp32 scale
BNB_SMALLEST = 4096  # bitsandbytes: smaller tensors keep fp32 state

Beta1 = Annotated[float, Key("decay of the running mean of gradients", ge=0, lt=1)]
Beta2 = Annotated[float, Key("decay of the running mean of squared gradients", ge=0, lt=1)]
Eps = Annotated[float, Key("added to the denominator", gt=0)]
MomentumKey = Annotated[float, Key("decay of the momentum buffer", gt=0, lt=1)]
Nesterov = Annotated[bool, Key("look ahead along the momentum")]


@node
class Optimizer(Node):
    """What every optimizer has: a peak learning rate, decay, clipping, the batch, what is skipped and a schedule.

    The rule of `skip_sigma` is that of OLMo-core's SkipStepOptimizer, which has 6 and 128.
    """

    group: ClassVar[str] = "optimizer"

    lr: Annotated[float, Key("peak learning rate", gt=0)]
    weight_decay: Annotated[float, Key("weight decay, on matrices only (no norms, biases, embeddings)", ge=0)]
    grad_clip: Annotated[float | None, Key("largest global gradient norm; null = no clipping", gt=0)]
    global_batch_tokens: Annotated[int | None, Key("tokens of one optimizer step over all devices; null = 64 rows of the stage", unit="tokens", gt=0)]
    skip_sigma: Annotated[float | None, Key("skip a step whose loss or gradient norm is so many standard deviations above the mean; null = never", gt=0)]
    skip_window: Annotated[int, Key("last accepted steps which that mean and deviation are of", unit="steps", ge=2)]
    max_skips: Annotated[int, Key("steps skipped, not finite or spiking, before a run stops; 0 = it stops at the first not finite", unit="steps", ge=0)]
    schedule: Schedule

    def check(self, where: str) -> Iterator[Problem]:
        if self.skip_sigma is not None and self.max_skips == 0:
            instead = f"type how many, such as {where}.max_skips=10, or {where}.skip_sigma=null"
            yield Problem(f"{where}.skip_sigma", f"{self.skip_sigma:g} is to skip steps, and {where}.max_skips=0 allows none", instead)

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        """The torch optimizers that together update every given parameter once."""
        raise NotImplementedError

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        """Bytes of state for one parameter with `param_bytes` an element, without the scalar step counter; torch's states have the parameter's dtype."""
        raise NotImplementedError

    def update_flops(self, shape: tuple[int, ...], name: str) -> float:
        """FLOPs of the matrix products in one update of a parameter."""
        return 0.0


@register("optimizer", "sgd")
class Sgd(Optimizer):
    """Stochastic gradient descent (Robbins & Monro 1951); no state."""

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        import torch

        return [torch.optim.SGD(split_decay(named_parameters, self.weight_decay), lr=self.lr, fused=True)]

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        return 0


@register("optimizer", "momentum")
class Momentum(Optimizer):
    """SGD with momentum (Polyak 1964; Nesterov 1983)."""

    momentum: MomentumKey
    nesterov: Nesterov

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        import torch

        groups = split_decay(named_parameters, self.weight_decay)
        return [torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)]

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        return param_bytes * numel(shape)


@register("optimizer", "adam")
class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); its weight decay is an L2 term in the gradient."""

    beta1: Beta1
    beta2: Beta2
    eps: Eps

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        import torch

        return [torch.optim.Adam(split_decay(named_parameters, self.weight_decay), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)]

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        return 2 * param_bytes * numel(shape)


@register("optimizer", "adamw")
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019): weight decay apart from the gradient, times the learning rate."""

    beta1: Beta1
    beta2: Beta2
    eps: Eps

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        import torch

        return [torch.optim.AdamW(split_decay(named_parameters, self.weight_decay), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)]

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        return 2 * param_bytes * numel(shape)


@register("optimizer", "adamw_8bit")
class AdamW8bit(Optimizer):
    """AdamW with block-wise 8-bit state (Dettmers et al. 2022) from bitsandbytes; tensors under 4,096 elements keep fp32 state."""

    needs = {"bitsandbytes": "bnb"}  # noqa: RUF012

    beta1: Beta1
    beta2: Beta2
    eps: Eps

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        try:
            import bitsandbytes
        except ImportError as error:
            raise RunError("optimizer.type", "adamw_8bit needs bitsandbytes, which is not installed", 'pip install "lmforge[bnb]"') from error
        library: Any = bitsandbytes.optim
        groups = split_decay(named_parameters, self.weight_decay)
        return [library.AdamW8bit(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, min_8bit_size=BNB_SMALLEST)]

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        """Two bytes an element and two fp32 scales a block; the two 1 KiB code tables are shared by all tensors and not counted.

        None of it follows the parameter's dtype.
        """
        count = numel(shape)
        if count < BNB_SMALLEST:
            return 2 * FP32_BYTES * count
        return 2 * count + 2 * FP32_BYTES * -(-count // BNB_BLOCK)


@register("optimizer", "adafactor")
class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018), torch's: a row and a column of second moments per matrix; the step is relative to the weights' RMS."""

    beta2_decay: Annotated[float, Key("exponent c of the running mean's decay 1 - step^c", gt=-1, le=0)]
    eps: Annotated[float, Key("smallest RMS of a weight that the step is relative to", gt=0)]
    update_clip: Annotated[float, Key("largest RMS of an update before the learning rate", ge=1)]

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        import torch

        groups = split_decay(named_parameters, self.weight_decay)
        return [torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=self.beta2_decay, eps=(None, self.eps), d=self.update_clip)]

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        count = numel(shape)
        return param_bytes * (count if len(shape) < 2 else count // shape[-1] + count // shape[-2])


@register("optimizer", "muon")
class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW with `adamw_lr` for embeddings, head, vectors and stacked (3-D) experts."""

    momentum: MomentumKey
    nesterov: Nesterov
    ns_steps: Annotated[int, Key("Newton-Schulz iterations that orthogonalize an update", gt=0, lt=100)]
    adjust_lr: Annotated[
        Literal["original", "match_rms_adamw"], Key("scale of an update by its shape: Jordan's sqrt(max(1, rows/columns)), or 0.2 sqrt(max(rows, columns))")
    ]
    adamw_lr: Annotated[float, Key("peak learning rate of the AdamW part", gt=0)]
    beta1: Beta1
    beta2: Beta2
    eps: Eps

    def build(self, named_parameters: Named) -> list[TorchOptimizer]:
        import torch

        listed = list(named_parameters)
        hidden = [parameter for name, parameter in listed if self._orthogonal(name, tuple(parameter.shape))]
        rest = [(name, parameter) for name, parameter in listed if not self._orthogonal(name, tuple(parameter.shape))]
        made: list[Any] = []
        if hidden:
            made.append(
                torch.optim.Muon(
                    hidden,
                    lr=self.lr,
                    weight_decay=self.weight_decay,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn=self.adjust_lr,
                )
            )
        if rest:
            groups = split_decay(rest, self.weight_decay)
            made.append(torch.optim.AdamW(groups, lr=self.adamw_lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True))
        return made

    def state_bytes(self, shape: tuple[int, ...], name: str, param_bytes: int) -> int:
        return (1 if self._orthogonal(name, shape) else 2) * param_bytes * numel(shape)

    def update_flops(self, shape: tuple[int, ...], name: str) -> float:
        """Newton-Schulz on the shorter side r of an r x c matrix: X X^T, its square and their product with X, each `ns_steps` times."""
        if not self._orthogonal(name, shape):
            return 0.0
        rows, columns = sorted(shape)
        return self.ns_steps * (4.0 * rows * rows * columns + 2.0 * rows**3)

    @staticmethod
    def _orthogonal(name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and role(name, shape) == "matrix"
