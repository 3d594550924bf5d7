"""What is predicted: a stage of a plan on its placement, and a model's sizes by which its layers are walked and counted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmforge.model.families import Weight
from lmforge.model.weights import sizes, splits, weights
from lmforge.parallel.layout import ONE
from lmforge.parallel.shards import Cut
from lmforge.stage.base import Load, TrainingStage
from lmforge.stage.workload import Workload
from lmforge.step import Placement

Kind = Literal["llama", "olmo2", "gemma2", "gpt2", "gpt_neox"]
KINDS: Mapping[str, Kind] = {"olmo2": "olmo2", "gemma2": "gemma2", "gpt2": "gpt2", "gpt_neox": "gpt_neox"}  # every other family has Llama's order

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, and what of its layers' code the sizes alone do not say. One of them for a whole model: its layers are alike but for `sparse_layers`."""

    family: str  # its model_type
    kind: Kind  # the order of a layer's operations
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of a dense feed-forward
    vocab: int
    tied: bool
    learned_positions: int  # rows of a position table; 0 with rotary positions
    gated: bool  # three matrices a feed-forward instead of two
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rotary_dim: int  # of head_dim; 0 without rotary positions
    dropout: bool  # the config drops activations out while training
    head_norm: Literal["none", "each", "all"] = "none"  # RMSNorm on queries and keys: of each head, or over all of them
    experts: int = 0
    top_experts: int = 0  # that one token uses
    expert_width: int = 0
    parallel: bool = False  # attention and feed-forward on the same input
    sparse_layers: int = 0  # with experts instead of a dense feed-forward

    @property
    def queries(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head_dim


def shape(config: Mapping[str, Any]) -> Shape:
    """The sizes of a known family's config.json (read beside transformers 5.23's modeling files)."""
    found, family = sizes(config), str(config["model_type"])
    more, kind = found.more, KINDS.get(family, "llama")
    normed: Mapping[str, Literal["each", "all"]] = {"qwen3": "each", "qwen3_moe": "each", "olmo2": "all"}
    bias = bool(more.get("attention_bias", False))
    all_bias, sparse = kind == "gpt2", _sparse_layers(family, more, found.num_hidden_layers)
    return Shape(
        family=family,
        kind=kind,
        hidden=found.hidden_size,
        layers=found.num_hidden_layers,
        heads=found.num_attention_heads,
        kv_heads=found.num_key_value_heads,
        head_dim=found.head_dim,
        intermediate=found.intermediate_size,
        vocab=found.vocab_size,
        tied=found.tie_word_embeddings,
        learned_positions=found.max_position_embeddings if kind == "gpt2" else 0,
        gated=kind not in ("gpt2", "gpt_neox"),
        qkv_bias=all_bias or bias or family == "qwen2",
        out_bias=all_bias or bias,
        mlp_bias=kind in ("gpt2", "gpt_neox") or bool(more.get("mlp_bias", False)),
        rotary_dim=0 if kind == "gpt2" else int(found.head_dim * _rotary_share(kind, more)),
        dropout=any(float(more.get(key) or 0) > 0 for key in DROPOUTS),
        head_norm=normed.get(family, "none"),
        experts=more["num_local_experts"] if sparse else 0,
        top_experts=more["num_experts_per_tok"] if sparse else 0,
        expert_width=more.get("moe_intermediate_size", found.intermediate_size) if sparse else 0,
        parallel=kind == "gpt_neox" and bool(more.get("use_parallel_residual", True)),
        sparse_layers=sparse,
    )


def _rotary_share(kind: Kind, more: Mapping[str, Any]) -> float:
    """GPT-NeoX turns a quarter of each head, where its config says nothing else (transformers' GPTNeoXConfig)."""
    given = (more.get("rope_parameters") or {}).get("partial_rotary_factor", more.get("rotary_pct"))
    return float(given if given is not None else 0.25 if kind == "gpt_neox" else 1.0)


def _sparse_layers(family: str, more: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts, as the family counts its weights."""
    if family == "mixtral":
        return layers
    if family != "qwen3_moe":
        return 0
    dense, step = more["mlp_only_layers"] or (), more["decoder_sparse_step"]
    return sum(more["num_local_experts"] > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


@dataclass(frozen=True)
class Job:
    """A training stage of a resolved and placed plan: the model's config.json, the stage with its lengths set, and where it runs."""

    config: Mapping[str, Any]
    stage: TrainingStage
    placement: Placement
    given: Workload | None = None  # what a step runs, where its lengths are known

    @functools.cached_property
    def shape(self) -> Shape:
        """The model's sizes."""
        return shape(self.config)

    @functools.cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The model's weights by name and shape."""
        return weights(self.config)

    @functools.cached_property
    def load(self) -> Load:
        """What the stage holds of them."""
        return self.stage.load(self.weights)

    @property
    def mesh(self) -> Mapping[str, int]:
        """Every axis with its size."""
        return ONE | dict(self.placement.mesh)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one data-parallel rank."""
        return self.placement.micro_batch_size or 1

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step on one data-parallel rank."""
        return self.placement.accumulation or 1

    @functools.cached_property
    def cut(self) -> Cut:
        """Who holds what of the weights."""
        return Cut(self.mesh, splits(self.config), self.shape.layers)

    @functools.cached_property
    def workload(self) -> Workload:
        """What an optimizer step runs on one data-parallel rank."""
        return self.given or self.stage.workload(self.rows, self.accumulation)
