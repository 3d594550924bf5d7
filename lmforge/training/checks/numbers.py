"""Checks of the model and the loss on real rows; each raises RunError that names the example at fault, and returns the largest difference it saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmforge.errors import RunError
from lmforge.inference.forward import logits
from lmforge.training import shared_prompt
from lmforge.training.checks.sample import Sample
from lmforge.training.losses.tokens import IGNORE, token_cross_entropy
from lmforge.training.objective import Batch, Objective, Preparing
from lmforge.training.objectives.causal_lm import PackedRows
from lmforge.training.objectives.kto import OTHER, other
from lmforge.training.objectives.preference import PairRows, logprobs, pair_logprobs
from lmforge.training.order import GlobalBatch

LONG = 36  # tokens of an answer whose mean difference may be the tolerance itself
MOST_PIECES = 16  # documents of packed rows that are computed alone too
MOST_GRADIENTS = 2**24  # numbers of a gradient that are compared: all of a small model's, of a large one's the smallest parameters'


@torch.no_grad()
def packing(sample: Sample, model: Any, device: torch.device, tolerance: float) -> float:
    """The loss of each token in a packed row is its loss in its own document alone (nats). 0 where no row of the sample holds two documents."""
    assert isinstance(sample.rows, PackedRows)
    packed = tuple(index for index in sample.indices if len(sample.rows.rows[index]) > 1)[:1]
    if not packed:
        return 0.0
    batch = Sample(sample.rows, sample.tokens, packed).batch(device)
    together = token_cross_entropy(logits(model, batch), batch["labels"])[0]
    bounds = _bounds([end - start for start, end in sample.rows.rows[packed[0]]])[:MOST_PIECES]
    alone = _alone(model, batch, bounds)
    worst = 0.0
    for (start, end), example, losses in zip(bounds, sample.examples_of(packed[0]), alone, strict=False):
        difference = float((together[start:end] - losses[: end - start]).abs().max())
        if not difference <= tolerance:
            what = f"the loss of a token is {difference:.2g} nats off when the example shares a row with others (allowed: {tolerance:g})"
            raise RunError(sample.name(example), what, "this model's attention ignores the borders between documents: use one that reads position_ids")
        worst = max(worst, difference)
    return worst


def _bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where pieces of these lengths begin and end, one after the other."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _alone(model: Any, batch: Batch, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Token losses of pieces of the batch's first row, a row each, padded on the right."""
    width = max(end - start for start, end in bounds)
    ids = torch.zeros(len(bounds), width, dtype=torch.int64, device=batch["input_ids"].device)
    labels = torch.full_like(ids, IGNORE)
    for row, (start, end) in enumerate(bounds):
        ids[row, : end - start] = batch["input_ids"][0, start:end]
        labels[row, : end - start] = batch["labels"][0, start:end]
    positions = torch.arange(width, device=ids.device).expand_as(ids)
    return token_cross_entropy(logits(model, {"input_ids": ids, "position_ids": positions}), labels)


@torch.no_grad()
def shared_prompts(sample: Sample, model: Any, device: torch.device, tolerance: float) -> float:
    """The log-prob of each answer is the same whether the prompt is computed once for both answers or for each (nats a token).

    0 where no pair of the sample shares its prompt.
    """
    what = "the log-prob of its answer, when the prompt is computed once for the pair, is {:.2g} nats a token off"
    worst = 0.0
    for index in sample.indices:
        pair = Sample(sample.rows, sample.tokens, (index,))
        batch = pair.batch(device)
        if shared_prompt.shares(model, batch):
            together, tokens = pair_logprobs(model, batch)
            alone, _ = logprobs(model, shared_prompt.unshare(batch))
            difference = _compare(pair, together.view(-1), alone, tokens.view(-1), tolerance, what, "this model must not share prompts; please report it")
            worst = max(worst, difference)
    return worst


@torch.no_grad()
def log_ratio(sample: Sample, model: Any, device: torch.device, tolerance: float) -> float:
    """The policy begins as the reference: its log-probs of the first answers are the cached ones (nats a token)."""
    batch, what = sample.batch(device), "the policy's log-prob of its answer is {:.2g} nats a token off the reference's before the first step"
    mend = "the reference log-probs are of other weights or other data: run the reference step again from this stage's checkpoint"
    if isinstance(sample.rows, PairRows):
        logps, tokens = pair_logprobs(model, batch)
        return _compare(sample, logps.view(-1), batch["reference"].view(-1), tokens.view(-1), tolerance, what, mend)
    logps, tokens = logprobs(model, batch)
    worst = _compare(sample, logps, batch["reference"], tokens, tolerance, what, mend)
    if f"{OTHER}reference" not in batch:
        return worst
    rows = other(batch)
    logps, tokens = logprobs(model, rows)
    return max(worst, _compare(sample, logps, rows["reference"], tokens, tolerance, f"with another prompt's answer, {what}", mend))


def _compare(sample: Sample, ours: Tensor, theirs: Tensor, tokens: Tensor, tolerance: float, what: str, mend: str) -> float:
    """The largest difference a token of two sets of log-probs, one an example of the sample.

    Tokens' roundings are independent, so the mean of n of them falls with the root of n: a short answer is allowed more.
    """
    differences = ((ours.double() - theirs.double()).abs() / tokens.clamp_min(1)).tolist()
    allowances = (tolerance * (LONG / tokens.clamp(1, LONG)).sqrt()).tolist()
    for example, difference, allowed in zip(sample.examples, differences, allowances, strict=True):
        if not difference <= allowed:
            raise RunError(sample.name(example), f"{what.format(difference)} (allowed: {allowed:.2g})", mend)
    return max(differences, default=0.0)


def accumulation(sample: Sample, objective: Objective, model: Any, device: torch.device, tolerance: float) -> float:
    """The gradient of rows taken whole is that of the same rows one by one: the relative norm of the difference."""
    ones = [Sample(sample.rows, sample.tokens, (index,)).batch(device) for index in sample.indices]
    whole, parts = (_gradient(objective, model, batches) for batches in ([sample.batch(device)], ones))
    size = torch.linalg.vector_norm(whole)
    difference = float(torch.linalg.vector_norm(whole - parts) / size) if size > 0 else float(parts.abs().max())
    if not difference <= tolerance:
        name = sample.name(sample.examples[0]) if sample.examples else f"row {sample.indices[0]}"
        what = f"the gradient of this example and the rest of the first {len(ones)} rows changes by {difference:.2g} when they are taken one by one"
        raise RunError(name, f"{what} (allowed: {tolerance:g})", "the loss must be a sum over rows, its weight too, and rows must not see each other")
    return difference


def _gradient(objective: Objective, model: Any, batches: Sequence[Batch]) -> Tensor:
    """The gradient of the batches' mean loss over some parameters, flat in fp32; no parameter's own `.grad` is touched."""
    weight = torch.stack([objective.weight(batch) for batch in batches]).sum()
    if isinstance(objective, Preparing):
        with torch.no_grad():
            batches = objective.prepare(model, GlobalBatch(0, batches, weight, 0)).micro_batches
    trained, total = _some(model), None
    for batch in batches:
        sums = torch.autograd.grad(objective.loss(model, batch).sum / weight.clamp_min(1), trained, allow_unused=True)
        flat = torch.cat([(torch.zeros_like(one) if found is None else found).float().flatten() for one, found in zip(trained, sums, strict=True)])
        total = flat if total is None else total + flat
    assert total is not None
    return total


def _some(model: Any) -> list[Tensor]:
    """The smallest trained parameters, as many as fit into MOST_GRADIENTS numbers; at least one."""
    chosen: list[Tensor] = []
    room = MOST_GRADIENTS
    for parameter in sorted((one for one in model.parameters() if one.requires_grad), key=lambda one: one.numel()):
        room -= parameter.numel()
        if room < 0 and chosen:
            break
        chosen.append(parameter)
    return chosen
