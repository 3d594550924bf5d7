"""What kernels get of this machine, by the same formulae that a time is predicted with (lmforge.predict.kernels), solved for the rate.

A kernel is repeated for a while, a few times over; the median counts. On a GPU the host waits for the device after each repetition only.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lmforge.hardware.calibration import Attention
from lmforge.predict.flops import FLASH_BACKWARD
from lmforge.predict.kernels import attention, product
from lmforge.predict.rates import PROLOGUE, Rates

DTYPES = ("float32", "bfloat16", "float16")
UPDATE_BYTES = 28  # a float32 element: AdamW reads weight, gradient and two states, and writes all but the gradient
SMALL_OPS = 50


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a CPU as large as the layers of models it can train, on a GPU large enough to fill it."""

    products: tuple[tuple[int, int, int], ...]
    attention: tuple[int, int, int, int]  # rows, heads, length, head_dim
    moved: int  # elements
    updated: tuple[int, int, int]  # tensors, rows, columns
    seconds: float  # of one repetition, at least
    repetitions: int


CPU = Sizes(((256, 512, 1536), (1024, 256, 1024), (512, 384, 1024)), (4, 8, 256, 32), 2**23, (16, 1024, 512), 0.05, 3)
GPU = Sizes(((8192, 4096, 4096), (8192, 4096, 11008), (8192, 8192, 8192)), (4, 16, 2048, 128), 2**28, (16, 4096, 4096), 0.05, 3)


@dataclass(frozen=True)
class Kernels:
    """Rates, under the names of `lmforge.hardware.calibration.Calibration`."""

    matmul: Mapping[str, float]
    attention: Mapping[str, Attention]
    memory: float
    update: float
    launch: float


def kernels(device: torch.device) -> Kernels:
    """All of them, in about 10 seconds."""
    sizes = GPU if device.type == "cuda" else CPU
    moved = memory(device, sizes)
    found = {dtype: matmul(device, dtype, sizes, moved) for dtype in DTYPES}
    scores = {dtype: scaled_dot_product(device, dtype, sizes) for dtype in DTYPES}
    return Kernels(found, scores, moved, update(device, sizes), launch(device, sizes))


def clock() -> float:
    """Seconds: of this process where it computes in one thread, so that other work on the machine does not count, else of the clock on the wall."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def taken(work: Callable[[], Any], device: torch.device, sizes: Sizes, repetitions: int | None = None) -> float:
    """Seconds of one call: the median of a few repetitions, after one to warm up."""
    _wait(device, work)
    found = []
    for _ in range(repetitions or sizes.repetitions):
        started, calls = clock(), 0
        while (passed := clock() - started) < sizes.seconds or not calls:
            if device.type == "cuda":
                _wait(device, *[work] * 10)
                calls += 10
            else:
                work()
                calls += 1
        found.append(passed / calls)
    return statistics.median(found)


def _wait(device: torch.device, *work: Callable[[], Any]) -> None:
    for one in work:
        one()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device, sizes: Sizes) -> float:
    """Bytes/s of adding two arrays that no cache holds."""
    a, b = (torch.randn(sizes.moved, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 3 * 4 * sizes.moved / taken(lambda: torch.add(a, b, out=out), device, sizes)


def matmul(device: torch.device, dtype: str, sizes: Sizes, moved: float) -> float:
    """FLOP/s of a linear layer's three products, as `kernels.product` has them: without the time that their bytes take."""
    of, found = getattr(torch, dtype), []
    for m, k, n in sizes.products:
        x, w, g = (torch.randn(*shape, device=device, dtype=of) for shape in ((m, k), (n, k), (m, n)))
        work = (lambda x=x, w=w: functional.linear(x, w), lambda g=g, w=w: g @ w, lambda g=g, x=x: g.t() @ x)
        for one, shape in zip(work, ((m, k, n), (m, n, k), (k, m, n)), strict=True):
            # At a rate of 1 FLOP/s, and with memory that takes no time, a product's seconds are its FLOPs.
            flops: float = product(*shape, _unit(device), of.itemsize)
            bytes_s: float = of.itemsize * (m * k + k * n + m * n) / moved
            seconds = taken(one, device, sizes, repetitions=1)
            found.append(flops / max(seconds - bytes_s, seconds / 4))
    return statistics.median(found)


def scaled_dot_product(device: torch.device, dtype: str, sizes: Sizes) -> Attention:
    """The fused kernel, causal and under a mask of two documents a row."""
    of, (rows, heads, length, head_dim) = getattr(torch, dtype), sizes.attention
    q, k, v = (torch.randn(rows, heads, length, head_dim, device=device, dtype=of, requires_grad=True) for _ in range(3))
    document = torch.arange(length, device=device) * 2 // length
    mask = (document[:, None] == document[None, :]).tril().expand(rows, 1, length, length)
    up = torch.randn(rows, heads, length, head_dim, device=device, dtype=of)
    found = []
    for causal in (True, False):
        given: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": mask}
        flops = attention(rows, length, heads, head_dim, _unit(device), of.itemsize, "causal" if causal else "masked").forward

        work = functools.partial(functional.scaled_dot_product_attention, q, k, v, **given)

        def whole(work: Callable[[], torch.Tensor] = work) -> None:
            torch.autograd.backward(work(), up)

        with torch.no_grad():
            forward = taken(work, device, sizes)
        backward = max(taken(whole, device, sizes) - forward, forward)
        found += [flops / forward, FLASH_BACKWARD * forward / backward]
    return Attention(causal=found[0], causal_backward=found[1], masked=found[2], masked_backward=found[3])


def update(device: torch.device, sizes: Sizes) -> float:
    """Bytes/s of the fused AdamW."""
    count, rows, columns = sizes.updated
    parameters = [torch.nn.Parameter(torch.randn(rows, columns, device=device)) for _ in range(count)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    for one in parameters:
        one.grad = torch.randn_like(one)
    return UPDATE_BYTES * count * rows * columns / taken(optimizer.step, device, sizes)


def launch(device: torch.device, sizes: Sizes) -> float:
    """Seconds of a small operation in forward, and of two in backward: the host's time, the device has nothing to do."""
    start, factor = torch.randn(16, 64, device=device, requires_grad=True), torch.randn(16, 64, device=device)

    def work() -> None:
        one = start
        for _ in range(SMALL_OPS):
            one = one * factor
        torch.autograd.backward(one.sum())

    return taken(work, device, sizes) / (3 * SMALL_OPS)


def _unit(device: torch.device) -> Rates:
    """Rates of 1 FLOP/s and boundless memory, so that a formula's seconds are FLOPs."""
    gpu = device.type == "cuda"
    units = torch.cuda.get_device_properties(device).multi_processor_count if gpu else None
    return Rates(
        gpu=gpu, units=units, matmul=1.0, prologue=PROLOGUE if gpu else 0.0, attention=1.0, attention_backward=1.0, masked=1.0, masked_backward=1.0,
        memory=float("inf"), update=1.0, launch=0.0, step=0.0, loader=1.0, exposed=1.0, residual=1.0, within=None, between=None, host=None, devices_per_node=1,
        measured=True,
    )  # fmt: skip


def loader(tokens: Path, seq_len: int) -> float:
    """Tokens/s of packing rows out of a folder of text tokens, in this process."""
    from lmforge.formats.tokens import Tokens
    from lmforge.training.objectives.causal_lm import PackedRows

    rows = PackedRows(Tokens(tokens, "train"), seq_len)
    indices = list(range(min(16, len(rows))))
    return len(indices) * seq_len / taken(lambda: rows.batch(indices), torch.device("cpu"), CPU)
