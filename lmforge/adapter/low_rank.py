"""LoRA and what grew out of it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from lmforge.adapter.base import Adapter, numel
from lmforge.adapter.targets import ALL_LINEAR, Linear, Trained, WeightLike, chosen, linears, low_rank, unmatched
from lmforge.errors import Problem
from lmforge.registry import Key, node, register

WHEELS = {"Linux": ("x86_64", "aarch64"), "Windows": ("AMD64", "ARM64"), "Darwin": ("arm64",)}  # of bitsandbytes 0.49 and later
BLOCK = 64  # bitsandbytes: weights that share one scale
NESTED_BLOCK = 256  # bitsandbytes: scales that share one scale of their own


@node
class LowRank(Adapter):
    """W + (alpha / r) B A beside frozen linear layers: the keys that LoRA and what grew out of it share."""

    magnitude: ClassVar[bool] = False  # DoRA: the norm of each output is trained too

    r: Annotated[int, Key("rank of the update: rows of A, columns of B", ge=1)]
    alpha: Annotated[float, Key("scale: the update counts alpha / r, or alpha / sqrt(r) with rslora", gt=0)]
    target_modules: Annotated[tuple[str, ...] | str, Key("all-linear (every linear layer but the output), or ends of module names: [q_proj, v_proj]")]
    dropout: Annotated[float, Key("share of a layer's input that the update does not see while training", ge=0, lt=1)]
    rslora: Annotated[bool, Key("scale by alpha / sqrt(r), so that larger ranks learn as fast (Kalajdzievski 2023)")]

    @property
    def reads_base(self) -> bool:
        return self.magnitude

    @property
    def targets(self) -> tuple[str, ...]:
        """`target_modules` as a tuple."""
        return (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules

    def layers(self, weights: Iterable[WeightLike]) -> list[Linear]:
        """The linear layers that are adapted."""
        return chosen(linears(weights), self.targets)

    def check(self, where: str) -> Iterator[Problem]:
        yield from super().check(where)
        if not self.targets or not all(name.strip() for name in self.targets):
            yield Problem(f"{where}.target_modules", "names nothing", f"type {ALL_LINEAR}, or module names such as [q_proj,v_proj]")
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            yield Problem(f"{where}.target_modules", f"{ALL_LINEAR} is all there is; it stands alone", f"type {where}.target_modules={ALL_LINEAR}")

    def problems(self, weights: Iterable[WeightLike], where: str) -> Iterator[Problem]:
        yield from unmatched(linears(weights), self.targets, where)

    def trainable(self, weights: Iterable[WeightLike]) -> list[Trained]:
        return low_rank(self.layers(weights), self.r, self.magnitude)

    def config(self) -> Any:
        """PEFT's config, but for the targets."""
        from lmforge.inference.adapters import library

        return library().LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.magnitude,
        )

    def attach(self, model: Any, seed: int | None = None) -> Any:
        from lmforge.adapter import attach

        return attach.low_rank(model, self.config(), self.targets, seed)


@register("adapter", "lora")
class Lora(LowRank):
    """LoRA (Hu et al. 2021): W + (alpha / r) B A on frozen linear layers, A and B trained, B zero at first."""

    init: Annotated[Literal["default", "pissa"], Key("B = 0 (default), or the largest singular directions of W taken out of it (PiSSA, Meng et al. 2024)")]

    @property
    def reads_base(self) -> bool:
        return self.init == "pissa"

    def check(self, where: str) -> Iterator[Problem]:
        yield from super().check(where)
        if self.init == "pissa" and self.dropout:
            yield Problem(f"{where}.dropout", "PiSSA moves a part of the weights into A and B, which dropout would take away", f"type {where}.dropout=0")

    def problems(self, weights: Iterable[WeightLike], where: str) -> Iterator[Problem]:
        listed = list(weights)
        yield from super().problems(listed, where)
        smallest = min(self.layers(listed), key=lambda one: min(one.inputs, one.outputs), default=None)
        if self.init == "pissa" and smallest is not None and self.r > (room := min(smallest.inputs, smallest.outputs)):
            what = f"{self.r} is more than the {room} singular values of {smallest.module.rpartition('.')[2]} that PiSSA starts from"
            yield Problem(f"{where}.r", what, f"type {where}.r={room} or less, or {where}.init=default")

    def config(self) -> Any:
        made = super().config()
        made.init_lora_weights = "pissa" if self.init == "pissa" else True
        return made


@register("adapter", "dora")
class Dora(LowRank):
    """DoRA (Liu et al. 2024): LoRA on the direction of each output's weights, and their norm trained apart."""

    magnitude: ClassVar[bool] = True


@register("adapter", "qlora")
class Qlora(LowRank):
    """QLoRA (Dettmers et al. 2023): LoRA on a base kept in 4 bits; products run in the stage's precision."""

    needs = {"bitsandbytes": "bnb"}  # noqa: RUF012

    quant_type: Annotated[Literal["nf4", "fp4"], Key("4-bit grid: nf4 has as many weights of a normal distribution in every step")]
    double_quant: Annotated[bool, Key("the scales are quantized too: 0.37 bits a weight less")]

    @property
    def reads_base(self) -> bool:
        return True

    @property
    def four_bit(self) -> dict[str, Any]:
        return {"quant_type": self.quant_type, "double_quant": self.double_quant}

    def check(self, where: str) -> Iterator[Problem]:
        yield from super().check(where)
        if reason := no_four_bit(platform.system(), platform.machine(), platform.mac_ver()[0]):
            yield Problem(where, reason, "type adapter=lora, whose base stays in 16 bits")

    def frozen_bytes(self, weights: Iterable[WeightLike], width: int) -> int:
        """Half a byte a quantized weight and its scales; embeddings, output layer, norms and stacked experts stay as they are."""
        listed = list(weights)
        small = {f"{one.module}.weight" for one in chosen(linears(listed), (ALL_LINEAR,))}
        return sum(self._bytes(numel(one) // one.count) * one.count if one.name in small else numel(one) * width for one in listed)

    def _bytes(self, count: int) -> int:
        blocks = -(-count // BLOCK)
        return -(-count // 2) + (blocks + 4 * -(-blocks // NESTED_BLOCK) if self.double_quant else 4 * blocks)

    def attach(self, model: Any, seed: int | None = None) -> Any:
        from lmforge.inference.four_bit import quantize

        return super().attach(quantize(model, **self.four_bit), seed)


def no_four_bit(system: str, machine: str, macos: str) -> str:
    """Why bitsandbytes does not run there, or an empty string: it comes for 64-bit Linux, Windows, and macOS 14 on Apple's own chips."""
    if machine not in WHEELS.get(system, ()):
        return f"bitsandbytes has no build for {system or 'this system'} on {machine or 'this processor'}"
    if system == "Darwin" and int((macos or "0").partition(".")[0]) < 14:
        return f"bitsandbytes needs macOS 14 or later, and this is {macos}"
    return ""
