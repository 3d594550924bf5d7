from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from lmforge.eval.bigram import Counts, bigram_perplexity, fit_weights, mean_nats, row_events, training_events
from lmforge.eval.perplexity import choose_rows
from lmforge.formats.tokens import Tokens


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_probabilities_by_hand() -> None:
    # the text 0 1 0 1 0 2 over a vocabulary of 4: c(0,1)=2, c(1,0)=2, c(0,2)=1; contexts 0:3, 1:2; words 0:2, 1:2, 2:1 of 5
    counts = Counts.of(ids(0, 1, 0, 1, 0), ids(1, 0, 1, 0, 2), 4)
    bigram, unigram, bucket = counts.probabilities(ids(0, 0, 1, 3), ids(1, 2, 3, 0))
    assert bigram.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert unigram.tolist() == pytest.approx([3 / 9, 2 / 9, 1 / 9, 3 / 9])
    assert bucket.tolist() == [2, 2, 2, 0]  # seen 3, 3, 2 and 0 times
    weights = np.zeros(65)
    weights[2] = 0.9
    expected = -(math.log(0.9 * 2 / 3 + 0.1 * 3 / 9) + math.log(3 / 9)) / 2  # an unseen context has the unigram alone
    assert mean_nats(counts, weights, ids(0, 3), ids(1, 0)) == pytest.approx(expected)


def test_probabilities_sum_to_one_in_every_context() -> None:
    chance = np.random.default_rng(0)
    counts = Counts.of(chance.integers(0, 5, 200), chance.integers(0, 7, 200), 7)
    weights = np.linspace(0, 0.9, 65)
    for context in range(7):
        bigram, unigram, bucket = counts.probabilities(np.full(7, context), np.arange(7))
        weight = weights[bucket]
        assert (weight * bigram + (1 - weight) * unigram).sum() == pytest.approx(1.0 if bucket[0] else (1 - weight[0]) * 1.0)


def test_weights_are_the_best_of_a_grid() -> None:
    chance = np.random.default_rng(1)
    context, word = chance.integers(0, 8, 3000), chance.integers(0, 8, 3000)
    word = np.where(chance.random(3000) < 0.6, (context * 3 + 1) % 8, word)  # a rule that holds three times in five
    counts = Counts.of(context[:400], word[:400], 8)
    tuned = fit_weights(counts, context[400:], word[400:])
    best = mean_nats(counts, tuned, context[400:], word[400:])
    used = set(counts.probabilities(context, word)[2].tolist())
    for bucket in used:
        for other in np.linspace(0.01, 0.99, 50):
            changed = tuned.copy()
            changed[bucket] = other
            assert best <= mean_nats(counts, changed, context[400:], word[400:]) + 3e-4  # the half event against a weight of 1


def test_events_stay_within_documents_and_match_the_models_labels(text_tokens: Path) -> None:
    train, heldout = Tokens(text_tokens, "train"), Tokens(text_tokens, "heldout")
    context, word, tune = training_events(train)
    assert len(context) == len(train.ids) - len(train)
    assert 0 not in context  # EOS ends a document and begins nothing
    assert tune.sum() == sum(len(train.example(index)[0]) - 1 for index in (19, 39, 59))
    seen, labels = row_events(heldout, choose_rows(heldout, None))
    documents = [heldout.example(index)[0].tolist() for index in range(len(heldout))]
    assert sorted(zip(seen.tolist(), labels.tolist(), strict=True)) == sorted(pair for one in documents for pair in itertools.pairwise(one))
    assert word.max() < 300


def test_it_beats_both_of_its_parts(text_tokens: Path) -> None:
    train, heldout = Tokens(text_tokens, "train"), Tokens(text_tokens, "heldout")
    rows = choose_rows(heldout, None)
    found = bigram_perplexity(train, heldout, rows)
    context, word, _ = training_events(train)
    unigram_only = math.exp(mean_nats(Counts.of(context, word, 300), np.zeros(65), *row_events(heldout, rows)))
    assert found["bigram_perplexity"] < unigram_only < 300
    assert found["bigram_train_tokens"] == len(word)
