"""torchtune's published peaks from shapes: pure bfloat16, its own layers, Inductor's saved tensors, chunked cross entropy, torchao's NF4 and FSDP2.

torchtune's layers are not transformers', so these rows have formulae of their own. Settings are those of torchtune's configs at the commits that added the
tables to its README (30b8519e8 of 2024-09-24, 1814feb17 of 2024-11-18): recipes/configs/llama3_1/8B_{full,lora,qlora}_single_device, 70B_{full,lora},
405B_qlora, llama3_2/3B_{full,lora,qlora}_single_device. Rows without lengths (baselines, tune2.0, tune3.x) are left out.

tune1.1 and tune1.3 are read as without checkpointing, which the rows do not say: with it they would be 47 and 44 % lower. tune1.7 states batch 2, at which
quantized weights, checkpointed inputs and logits alone are as much as was measured, so that it is read with its config's batch 1 beside.
"""

from __future__ import annotations

from dataclasses import dataclass

W = 2  # bytes: bfloat16 everywhere
EVERY = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
MATRICES = EVERY - {"k"}  # of llama3_2/3B's LoRA: lora_attn_modules q, v, output, and lora_apply_to_mlp


@dataclass(frozen=True)
class Model:
    """Llama 3's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    vocab: int = 128256
    head_dim: int = 128

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Elements of a layer's matrices."""
        return self.hidden * (2 * self.queries + 2 * self.kv_heads * self.head_dim + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        return self.matrices + 2 * self.hidden

    @property
    def table(self) -> int:
        return self.vocab * self.hidden

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.table * (1 if self.tied else 2) + self.hidden

    def low_rank(self, rank: int, names: frozenset[str]) -> int:
        q, k, h, f = self.queries, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        sizes = {"q": h + q, "k": h + k, "v": h + k, "o": q + h, "gate": h + f, "up": h + f, "down": f + h}
        return self.layers * rank * sum(sizes[name] for name in names)


L3B, L8B = Model(3072, 28, 24, 8, 8192, True), Model(4096, 32, 32, 8, 14336, False)
L70B, L405B = Model(8192, 80, 64, 8, 28672, False), Model(16384, 126, 128, 8, 53248, False)


@dataclass(frozen=True)
class Row:
    """A row's settings."""

    model: Model
    tokens: int
    method: str = "full"
    rank: int = 8
    names: frozenset[str] = frozenset({"q", "v"})
    compiled: bool = True
    chunked: bool = True  # cross entropy in 8 chunks, logits in bfloat16
    checkpoint: bool = True
    offload: bool = False  # checkpointed inputs lie on the host
    fused_backward: bool = False  # a gradient is used as soon as it is there
    state: float = 2.0 * W  # bytes of the optimizer a trained parameter; paged ones are not the allocator's
    ranks: int = 1
    host: bool = False  # weights and optimizer lie on the host
    root_tables: bool = False

    @property
    def trained(self) -> frozenset[str]:
        return EVERY if self.method == "full" else self.names


def kept(row: Row) -> int:
    """Bytes that a layer keeps for backward: as Inductor's partitioner cuts it, keys and values repeated; or what autograd saves of torchtune's code."""
    m, t = row.model, row.tokens
    x, q, f, lse = t * m.hidden * W, t * m.queries * W, t * m.intermediate * W, t * m.heads * 4
    if not row.compiled:
        return 2 * (3 * x + t * 4) + 2 * x + 4 * q + lse + 2 * t * m.head_dim * 4 + 4 * f
    inputs = (x if row.trained & {"q", "k", "v"} else 0) + (x if row.trained & {"gate", "up"} else 0) + (f if "down" in row.trained else 0)
    return 2 * x + 4 * q + lse + 2 * f + inputs


def head(row: Row) -> int:
    """Logits and loss. Whole: cast to float32 by the model, with log-softmax and its gradient, which compiling the loss alone does not change. In chunks: all
    chunks' logits, one gradient at a time; where the head is trained, a chunk's gradient of it, the sum so far, and their sum made apart."""
    logits = row.tokens * row.model.vocab * W
    if not row.chunked:
        return 3 * row.tokens * row.model.vocab * 4
    return max(logits + logits // 8, logits - logits // 8 + 3 * row.model.table * W) if row.method == "full" else logits + logits // 8


def weights(row: Row) -> tuple[int, int]:
    """(bytes of all weights, trained parameters). NF4: half a byte, an int8 scale for 64 weights, a float32 scale for 256 of those (Dettmers et al. 2023)."""
    m = row.model
    if row.method == "full":
        return m.total * W, m.total
    adapter, linear = m.low_rank(row.rank, row.names), m.layers * m.matrices
    base = m.total * W if row.method == "lora" else _nf4(linear) + (m.total - linear) * W
    return base + adapter * W, adapter


def _nf4(count: int) -> int:
    return count // 2 + count // 64 + count // 64 // 256 * 4


def moments(row: Row) -> dict[str, float]:
    """Bytes at each moment of a step that may be its fullest."""
    m, full = row.model, row.method == "full"
    every, trained = weights(row)
    x, f, layer = row.tokens * m.hidden * W, row.tokens * m.intermediate * W, kept(row)
    rest = 0 if row.host else (every + trained * row.state) / row.ranks
    grads = 0 if row.fused_backward or row.host else trained * W / row.ranks
    gathered = at_loss = 0
    if row.ranks > 1:  # FSDP2: a layer in use and the next one; the head by itself
        one = m.layer * W if row.method != "qlora" else _nf4(m.layer)
        gathered = 2 * one + (m.layer * W if full else 0)
        at_loss = m.table * W * (2 if row.root_tables else 1) + one
    saved = (0 if row.offload else m.layers * x) if row.checkpoint else m.layers * layer
    again = layer if row.checkpoint else 0
    return {
        "loss": rest + saved + head(row) + at_loss,
        "last layer": rest + saved + again + 2 * f + gathered + (m.table * W / row.ranks if full else 0),
        "first layer": rest + grads * (1 - m.layer / m.total) + layer + 2 * f + gathered + (x if row.checkpoint else 0),
        "embedding": rest + grads + (m.table * W if full else 0),
        "update": rest + grads,
    }


T1, T2 = 2 * 2048, 2 * 4096
ROWS = {
    "tune1.0": Row(L8B, T1, fused_backward=True, state=0),  # bitsandbytes' PagedAdamW8bit lies in managed memory
    "tune1.1": Row(L8B, T1, fused_backward=True, state=0, checkpoint=False),
    "tune1.2": Row(L8B, T1, "lora"),
    "tune1.3": Row(L8B, T1, "lora", checkpoint=False),
    "tune1.4": Row(L8B, T1, "qlora", names=EVERY),
    "tune1.5": Row(L70B, T1, ranks=8, host=True),
    "tune1.6": Row(L70B, T1, "lora", rank=16, names=frozenset({"q", "k", "v"}), ranks=8, root_tables=True),
    "tune1.7": Row(L405B, T1, "qlora", rank=16, names=EVERY, ranks=8, chunked=False, root_tables=True),
    "tune1.7 with its config's batch": Row(L405B, T1 // 2, "qlora", rank=16, names=EVERY, ranks=8, chunked=False, root_tables=True),
    "tune2.1": Row(L3B, T2, compiled=False, chunked=False, checkpoint=False),
    "tune2.2": Row(L3B, T2, chunked=False, checkpoint=False),
    "tune2.3": Row(L3B, T2, checkpoint=False),
    "tune2.4": Row(L3B, T2),
    "tune2.5": Row(L3B, T2, fused_backward=True),
    "tune2.6": Row(L3B, T2, fused_backward=True, offload=True),
    "tune2.7": Row(L3B, T2, fused_backward=True, offload=True, state=2 + 8 / 256),  # 8-bit AdamW: two bytes, and two scales for 256
    "tune2.8": Row(L3B, T2, "lora", rank=64, names=MATRICES, offload=True),
    "tune2.9": Row(L3B, T2, "qlora", rank=64, names=MATRICES, offload=True),
}
