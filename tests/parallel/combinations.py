"""Combinations of more than two kinds that a user would type, for test_cells.py: (stage, option and keys of `parallel`, other overrides)."""

from __future__ import annotations

BF16, LORA = "precision=bf16", "adapter=lora"
OFFLOADED = "deepspeed_zero3 parallel.offload_optimizer=true parallel.offload_parameters=true"
BF16_SUMS, BF16_WEIGHTS = f"{BF16} precision.reduce_dtype=bfloat16", f"{BF16} precision.param_dtype=bfloat16"
SELECTIVE, FULL = "parallel.activation_checkpointing=selective", "parallel.activation_checkpointing=full"

COMBINED: tuple[tuple[str, str, str], ...] = (
    # The lower stages of ZeRO, and offloading. The sums first: once DeepSpeed has been told of autocast in a process, it takes their dtype from there.
    ("pretrain", "deepspeed_zero2", BF16_SUMS),
    ("pretrain", "deepspeed_zero1", ""),
    ("pretrain", "deepspeed_zero1", BF16),
    ("pretrain", "deepspeed_zero2", BF16),
    ("dpo", "deepspeed_zero1", LORA),
    ("sft", "deepspeed_zero1", "adapter=prompt_tuning"),
    ("sft", "deepspeed_zero2", LORA),
    ("sft", "deepspeed_zero2", "adapter=dora"),
    ("pretrain", "deepspeed_zero2 parallel.offload_optimizer=true", ""),
    ("pretrain", OFFLOADED, ""),
    # A stage with an adapter in a precision
    ("dpo", "deepspeed_zero3", f"{LORA} {BF16}"),
    ("dpo", "fsdp", f"{LORA} {BF16}"),
    ("dpo", "fsdp_zero2", f"{LORA} {BF16}"),
    ("dpo", "tp", BF16),
    ("grpo", "fsdp", LORA),
    ("kto", "fsdp", f"adapter=dora {BF16}"),
    ("ppo", "ddp", LORA),
    ("ppo", "fsdp", f"{LORA} {BF16}"),
    ("reward", "hsdp", LORA),
    ("reward", "fsdp", BF16),
    ("sft", "ddp", f"adapter=qlora {BF16}"),
    ("sft", "fsdp", f"adapter=qlora {BF16}"),
    ("sft", "fsdp", f"{LORA} {BF16_WEIGHTS}"),
    ("sft", "fsdp", f"{LORA} precision=fp16"),
    ("sft", "fsdp parallel.cpu_offload=true", f"{LORA} {BF16}"),
    ("sft", "pp", BF16),
    ("sft", "tp", f"optimizer=muon {BF16}"),
    ("pretrain", "fsdp", f"optimizer=muon {BF16}"),
    # Sums over ranks in bfloat16
    ("pretrain", "ddp", BF16_SUMS),
    ("pretrain", "fsdp", BF16_SUMS),
    # What is recomputed, guarded and compiled
    ("dpo", f"ddp {FULL}", LORA),
    ("dpo", f"fsdp {FULL}", LORA),
    ("sft", f"fsdp {SELECTIVE}", f"adapter=qlora {BF16}"),
    ("sft", f"deepspeed_zero3 {SELECTIVE}", LORA),
    ("pretrain", f"tp {SELECTIVE}", ""),
    ("pretrain", f"pp {SELECTIVE}", ""),
    ("pretrain", "fsdp", "optimizer.max_skips=4"),
    ("pretrain", "tp", "optimizer.max_skips=4"),
    ("pretrain", "pp", "optimizer.max_skips=4"),
    ("pretrain", "fsdp parallel.compile=true", ""),
    ("pretrain", "tp parallel.compile=true", ""),
)
