"""What a config may name of tokenizers, and the step that turns a corpus into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from lmforge.errors import ConfigError, Problem
from lmforge.registry import Key, register
from lmforge.step import Context, StepNode
from lmforge.tokenizer.markers import SPECIAL_TOKENS

SMALLEST = 256 + len(SPECIAL_TOKENS)  # every byte and every special token has an entry before the first merge


class Tokenizer(StepNode):
    """Where a pipeline's tokenizer comes from: `trains` says whether it is a step of its own, which needs a corpus."""

    group = "tokenizer"
    produces = "tokenizer"
    trains: ClassVar[bool] = False


@register("tokenizer", "bpe")
class BPE(Tokenizer):
    """Byte-level BPE (Sennrich et al. 2016, bytes as in GPT-2) trained on the corpus's training text: any text round-trips.

    Of a corpus without text rows it takes the chats' contents, and without those the texts of pairs or prompts.
    """

    code_revision = 2  # the marker of a tool turn is a special token
    consumes = ("corpus",)
    trains = True

    vocab_size: Annotated[int | None, Key("entries, special tokens included; null is the model's vocab_size", ge=SMALLEST)]
    min_frequency: Annotated[int, Key("how often a pair must occur to become an entry", ge=1)]

    def run(self, context: Context) -> dict[str, Any]:
        """Train, and write a folder that AutoTokenizer opens. DataError where the corpus has no training rows."""
        from lmforge.tokenizer import bpe

        if self.vocab_size is None:
            raise ConfigError("model.tokenizer.vocab_size", "is null and was not resolved", "give it a number")
        return bpe.train(context.inputs["corpus"], context.out, self.vocab_size, self.min_frequency, context.report)


@register("tokenizer", "own")
class Own(Tokenizer):
    """The tokenizer in the folder the weights come from, as it is; there is nothing to train."""


@register("step", "tokenize")
class Tokenize(StepNode):
    """One view of a corpus as token ids with a mask of what is supervised, rendered by the tokenizer's own chat template or ours."""

    code_revision = 2  # tool turns; prompts of several turns; what a template makes of a content is looked at turn by turn
    consumes = ("corpus", "tokenizer")
    produces = "tokens"

    view: Annotated[Literal["text", "chat", "preference", "feedback", "prompt"], Key("rows to take; feedback and prompt can be made of other views'")]
    seq_len: Annotated[int, Key("longest example; a text is never cut, a longer prompt is left out", unit="tokens", ge=2)]
    vocab_size: Annotated[int, Key("the model's vocabulary, which every id must be in", gt=0)]

    def check(self, where: str) -> Iterator[Problem]:
        """Ids are stored in at most 32 bits."""
        if self.vocab_size > 2**32:
            yield Problem(f"{where}.vocab_size", f"{self.vocab_size:,} ids do not fit in 32 bits")

    def run(self, context: Context) -> dict[str, Any]:
        """Write the `tokens` artifact of both splits. DataError where the tokenizer does not fit or every row is bad."""
        from lmforge.tokenizer import tokenize

        inputs = context.inputs
        return tokenize.write(inputs["corpus"], inputs["tokenizer"], context.out, self.view, self.seq_len, self.vocab_size, context.report)
