"""Published formulae of memory, as their authors have them: what the tables in ../shared/data are held against. lmforge's own plans do not use them."""

from __future__ import annotations


def zero_bytes(params: float, degree: int, stage: int, k: int = 12) -> float:
    """Bytes of model states a device (Rajbhandari et al. 2020, arXiv 1910.02054, figure 1): mixed-precision Adam, 2 weights + 2 gradients + K = 12."""
    return params * {0: 4 + k, 1: 4 + k / degree, 2: 2 + (2 + k) / degree, 3: (4 + k) / degree}[stage]


def deepspeed_zero2(params: float, devices: int, *, offload_optimizer: bool, factor: float = 1.5) -> tuple[float, float]:
    """(bytes a device, bytes of the host) on one node, as DeepSpeed's documentation tabulates estimate_zero2_model_states_mem_needs.

    The code of DeepSpeed 0.19 says 2N + 18N / devices without offload, where the documentation's table is 4N + 16N / devices.
    """
    if offload_optimizer:
        return 2 * params, params * max(4 * devices, 16) * factor
    return 4 * params + 16 * params / devices, params * 4 * devices * factor


def deepspeed_zero3(
    params: float, largest_layer: float, devices: int, *, offload_optimizer: bool, offload_params: bool, zero_init: bool, factor: float = 1.5
) -> tuple[float, float]:
    """The same of estimate_zero3_model_states_mem_needs: 4 bytes of the largest layer gathered, 18N split, 16N on the host where offloaded."""
    largest = 4 * largest_layer
    if not offload_optimizer:
        return largest + 18 * params / devices, (largest_layer if zero_init else params) * 4 * devices * factor
    split, kept = (0.0, 18) if offload_params else (2 * params / devices, 16)
    return largest + split, params * (kept if zero_init else max(4 * devices, kept)) * factor


def korthikanti(s: int, b: int, h: int, a: int, t: int, mode: str) -> float:
    """Activation bytes of a GPT layer in 16 bits with dropout masks (Korthikanti et al. 2022, arXiv 2205.05198, equations 1-6, table 2)."""
    scores = 5 * a * s / h
    modes = {
        "none": 34 + scores, "tp": 10 + 24 / t + scores / t, "tp_sp": 34 / t + scores / t, "tp_sel": 10 + 24 / t, "tp_sp_sel": 34 / t, "full": 2.0,
    }  # fmt: skip
    return s * b * h * modes[mode]
