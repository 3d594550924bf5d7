"""Checks of the examples themselves; each raises DataError that names the first example at fault."""

from __future__ import annotations

import numpy as np

from lmforge.errors import DataError
from lmforge.training.checks.sample import Sample
from lmforge.training.losses.tokens import IGNORE

TOKENIZE = "look at the chat template and the data, then run the tokenize step again"


def supervised(sample: Sample) -> None:
    """Every example has a token to learn. The first one of an example is never predicted, so it does not count."""
    for example in sample.examples:
        ids, mask = sample.tokens.example(example)
        if not mask[1:].any():
            raise DataError(sample.name(example), f"none of its {len(ids)} tokens is supervised, so nothing is learned from it", TOKENIZE)


def end_token(sample: Sample) -> None:
    """Every supervised stretch ends with a token that ends a generation, unless the example was cut at seq_len there."""
    stops, seq_len = sample.tokens.meta["stop_token_ids"], sample.tokens.meta["seq_len"]
    for example in sample.examples:
        ids, mask = sample.tokens.example(example)
        ends = np.flatnonzero(np.diff(mask, append=0).astype(np.int8) == -1)  # the last token of each stretch
        for end in ends.tolist():
            cut = end == len(ids) - 1 and len(ids) >= seq_len
            if int(ids[end]) not in stops and not cut:
                what = f"its supervised tokens end with {int(ids[end])} at place {end}, not with an end token ({', '.join(map(str, stops))})"
                raise DataError(sample.name(example), what, f"the model would never learn to stop: {TOKENIZE}")


def labels(sample: Sample) -> None:
    """A row that the loss gets has a label for each supervised token of its examples: none was lost on the way, none was added."""
    for index in sample.indices:
        examples = sample.examples_of(index)
        expected = sum(int(sample.tokens.example(example)[1][1:].sum()) for example in examples)
        found = int((sample.rows.batch([index])["labels"] != IGNORE).sum())
        if found != expected:
            what = f"its row has {found} labels for {expected} supervised tokens"
            raise DataError(sample.name(examples[0]), what, "the objective's rows must keep each of them, and add none")


def pairs_differ(sample: Sample) -> None:
    """Chosen and rejected are not the same tokens."""
    for example in sample.examples[::2]:
        if np.array_equal(sample.tokens.example(example)[0], sample.tokens.example(example + 1)[0]):
            raise DataError(sample.name(example), "is the same tokens as the rejected one, so there is nothing to prefer", "drop the pair from the data")


def both_kinds(sample: Sample) -> None:
    """Desirable and undesirable answers are both there, in the whole split."""
    kinds = sample.tokens.labels
    assert kinds is not None
    for kind, word in ((1, "desirable"), (0, "undesirable")):
        if len(kinds) and not (np.asarray(kinds) == kind).any():
            what = f"like all {len(kinds):,} it is not {word}, and the loss needs answers of both kinds"
            raise DataError(sample.name(sample.examples[0]), what, "give feedback with labels true and false, or choose stage=sft")
