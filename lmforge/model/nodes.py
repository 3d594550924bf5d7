"""What a config may name of models: shapes of known families, one dial, or any config.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from lmforge.errors import Problem
from lmforge.formats.store import hub_id
from lmforge.model import dial
from lmforge.model.agree import VOLATILE
from lmforge.model.fetch import FetchWeights
from lmforge.model.fetch_tokenizer import FetchTokenizer
from lmforge.model.source import local_folder, read_config
from lmforge.model.weights import nearest_divisors
from lmforge.registry import Key, Node, node, register
from lmforge.tokenizer.nodes import Tokenizer

__all__ = ["Dial", "FetchTokenizer", "FetchWeights", "Gpt2", "HuggingFace", "Llama", "Model", "Olmo2"]


@node
class Model(Node):
    """Base of every model: an architecture as config.json says it, perhaps weights to start from, and a tokenizer."""

    group = "model"

    # Not identity: named weights are a step of their own, whose content is hashed; a path never is.
    pretrained: Annotated[str | None, Key("weights to start from: a local folder or a hub id (org/name, org/name@<commit>); null = none", identity=False)]
    revision: Annotated[str | None, Key("hub commit of those weights; null = the hub's newest", identity=False)]
    tokenizer: Annotated[Tokenizer, Key("where the tokenizer comes from")]

    def config(self) -> dict[str, Any]:
        """The config.json that transformers builds the model from; token ids are the tokenizer's to add."""
        raise NotImplementedError(f"{type(self).__name__} has no config()")

    def check(self, where: str) -> Iterator[Problem]:
        if self.revision and not self.pretrained:
            yield Problem(f"{where}.revision", "is a commit of weights that are not named", f"set {where}.pretrained, or null")
        elif self.revision and self.pretrained and local_folder(self.pretrained):
            yield Problem(f"{where}.revision", f"{self.pretrained} is a local folder, which has no commits", f"set {where}.revision=null")
        elif self.revision and self.pretrained and (found := hub_id(self.pretrained)) and found[1] not in (None, self.revision):
            yield Problem(f"{where}.revision", f"{self.pretrained} is pinned to another commit than {self.revision}", f"set {where}.revision=null")


@node
class Rotary(Model):
    """Shape keys that the families with rotary positions, RMSNorm and SwiGLU share."""

    vocab_size: Annotated[int, Key("rows of the embedding; the tokenizer may have fewer", "tokens", ge=1)]
    hidden_size: Annotated[int, Key("width of the residual stream", ge=1)]
    intermediate_size: Annotated[int, Key("width of the feed-forward", ge=1)]
    num_hidden_layers: Annotated[int, Key("decoder layers", ge=1)]
    num_attention_heads: Annotated[int, Key("query heads; they divide hidden_size", ge=1)]
    num_key_value_heads: Annotated[int | None, Key("key-value heads (Ainslie et al. 2023); null = as many as heads", ge=1)]
    max_position_embeddings: Annotated[int, Key("longest sequence", "tokens", ge=1)]
    rope_theta: Annotated[float, Key("base of the rotary frequencies (Su et al. 2021)", gt=0)]
    rms_norm_eps: Annotated[float, Key("added to the mean square in RMSNorm", gt=0, lt=1)]
    tie_word_embeddings: Annotated[bool, Key("whether the output head is the embedding")]
    initializer_range: Annotated[float, Key("standard deviation of fresh weights", gt=0, le=1)]

    def check(self, where: str) -> Iterator[Problem]:
        yield from super().check(where)
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        yield from divides(f"{where}.num_attention_heads", heads, "heads", width, "hidden_size")
        if width % heads == 0 and width // heads % 2:
            instead = "rotary positions turn pairs of numbers: take fewer heads or another hidden_size"
            yield Problem(f"{where}.num_attention_heads", f"{heads} heads of hidden_size {width} are {width // heads} wide, an odd number", instead)
        yield from divides(f"{where}.num_key_value_heads", groups, "key-value heads", heads, "num_attention_heads")

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture()],
            "model_type": self.type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
        }

    def architecture(self) -> str:
        """transformers' class."""
        raise NotImplementedError(f"{type(self).__name__} has no architecture()")


@register("model", "llama")
class Llama(Rotary):
    """Llama (Touvron et al. 2023): RMSNorm before each block, rotary positions, SwiGLU, grouped queries, no biases."""

    def architecture(self) -> str:
        return "LlamaForCausalLM"

    def config(self) -> dict[str, Any]:
        return {**super().config(), "mlp_bias": False, "head_dim": self.hidden_size // self.num_attention_heads}


@register("model", "olmo2")
class Olmo2(Rotary):
    """OLMo 2 (OLMo Team 2024, arXiv 2501.00656): RMSNorm after each block and on queries and keys, else as Llama."""

    def architecture(self) -> str:
        return "Olmo2ForCausalLM"


@register("model", "gpt2")
class Gpt2(Model):
    """GPT-2 and GPT-3 (Radford et al. 2019, Brown et al. 2020): learned positions, LayerNorm, GELU, biases, dense attention."""

    vocab_size: Annotated[int, Key("rows of the embedding; the tokenizer may have fewer", "tokens", ge=1)]
    hidden_size: Annotated[int, Key("width of the residual stream", ge=1)]
    intermediate_size: Annotated[int, Key("width of the feed-forward", ge=1)]
    num_hidden_layers: Annotated[int, Key("decoder layers", ge=1)]
    num_attention_heads: Annotated[int, Key("heads; they divide hidden_size", ge=1)]
    max_position_embeddings: Annotated[int, Key("learned positions, so the longest sequence", "tokens", ge=1)]
    layer_norm_epsilon: Annotated[float, Key("added to the variance in LayerNorm", gt=0, lt=1)]
    dropout: Annotated[float, Key("of embeddings, attention and residuals while training", ge=0, lt=1)]
    tie_word_embeddings: Annotated[bool, Key("whether the output head is the embedding")]
    initializer_range: Annotated[float, Key("standard deviation of fresh weights", gt=0, le=1)]

    def check(self, where: str) -> Iterator[Problem]:
        yield from super().check(where)
        yield from divides(f"{where}.num_attention_heads", self.num_attention_heads, "heads", self.hidden_size, "hidden_size")

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.max_position_embeddings,
            "n_embd": self.hidden_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
            "n_inner": self.intermediate_size,
            "activation_function": "gelu_new",
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
            "resid_pdrop": self.dropout,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
        }


@register("model", "dial")
class Dial(Model):
    """A Llama from one number, as nanochat's `--depth`: `params` gives depth, width, heads and feed-forward (rule: model/dial.py)."""

    params: Annotated[float, Key("parameters in all, embeddings included; the shape nearest to it is taken", "parameters", gt=0, le=1e13)]
    vocab_size: Annotated[int, Key("rows of the embedding; the tokenizer may have fewer", "tokens", ge=1)]
    max_position_embeddings: Annotated[int, Key("longest sequence", "tokens", ge=1)]
    rope_theta: Annotated[float, Key("base of the rotary frequencies (Su et al. 2021)", gt=0)]
    rms_norm_eps: Annotated[float, Key("added to the mean square in RMSNorm", gt=0, lt=1)]
    tie_word_embeddings: Annotated[bool, Key("whether the output head is the embedding")]
    initializer_range: Annotated[float, Key("standard deviation of fresh weights", gt=0, le=1)]

    def check(self, where: str) -> Iterator[Problem]:
        yield from super().check(where)
        least = dial.smallest(self.vocab_size, self.tie_word_embeddings)
        if self.params < least:
            what = f"{self.params:g} is too few for a vocabulary of {self.vocab_size}"
            yield Problem(f"{where}.params", what, f"take at least {least}, or a smaller {where}.vocab_size")

    def config(self) -> dict[str, Any]:
        found = dial.shape(self.params, self.vocab_size, self.tie_word_embeddings)
        same = ("vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
        return Llama(
            pretrained=None,
            revision=None,
            tokenizer=self.tokenizer,
            hidden_size=found.hidden_size,
            intermediate_size=found.intermediate_size,
            num_hidden_layers=found.num_hidden_layers,
            num_attention_heads=found.num_attention_heads,
            num_key_value_heads=None,
            **{name: getattr(self, name) for name in same},
        ).config()


@register("model", "hf")
class HuggingFace(Model):
    """Any causal language model by its config.json: a local folder (weights not needed to plan) or a hub id."""

    pretrained: Annotated[str, Key("a local folder or a hub id (org/name, org/name@<commit>); its config.json decides the model", identity=False)]

    def config(self) -> dict[str, Any]:
        """What config.json says of the architecture: which version wrote it, where and in which dtype, is no part of that."""
        return {key: value for key, value in read_config(self.pretrained, self.revision, "model.pretrained").items() if key not in VOLATILE}


def divides(where: str, part: int, parts: str, whole: int, name: str) -> Iterator[Problem]:
    """A problem unless `part` divides `whole`, with the nearest numbers that do."""
    if whole % part:
        yield Problem(where, f"{part} {parts} do not divide {name} {whole}", f"take {nearest_divisors(whole, part)}")
