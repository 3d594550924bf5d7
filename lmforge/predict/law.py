"""Scaling laws: what loss a model of N parameters reaches on D tokens, and which N and D are best for a number of FLOPs.

The form is Hoffmann et al. 2022 (arXiv 2203.15556), approach 3. Equation 2: L(N, D) = E + A / N^alpha + B / D^beta. With 6ND = C FLOPs it is least
where (equation 4, appendix D.3) N = G (C/6)^(beta / (alpha + beta)) and D = (C/6)^(alpha / (alpha + beta)) / G, G = (alpha A / (beta B))^(1 / (alpha + beta)).
Without a law the rule is theirs too: about 20 tokens a parameter (table 3), so N = sqrt(C / 120).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmforge.errors import ConfigError, did_you_mean

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3
FORM = "chinchilla"
CONSTANTS = ("E", "A", "B", "alpha", "beta")
INSTEAD = '{"form": "chinchilla", "E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28} is one (Hoffmann et al. 2022)'
LARGEST_FILE = 2**20
REACH = (1e3, 1e40)  # FLOPs for which the optimum of a usable law is a finite number


@dataclass(frozen=True)
class Best:
    """Parameters and tokens that a number of FLOPs is best spent on."""

    parameters: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """Fitted constants, and where they were fitted: `bounds` of N and D as (least, most), beyond which the law extrapolates."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    source: str = ""

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        found: float = self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta
        return found

    def best(self, flops: float) -> Best:
        """The compute-optimal sizes for 6ND FLOPs. In logarithms, for small exponents make large powers."""
        both, product = self.alpha + self.beta, math.log(flops / 6)
        log_g = math.log(self.alpha * self.A / (self.beta * self.B)) / both
        return Best(math.exp(log_g + product * self.beta / both), math.exp(product * self.alpha / both - log_g))

    def beyond(self, parameters: float, tokens: float) -> str:
        """Which of its bounds a point lies outside of, in words; empty where it lies within."""
        outside = []
        for name, value in (("N", parameters), ("D", tokens)):
            least, most = self.bounds.get(name, (0.0, math.inf))
            if not least <= value <= most:
                outside.append(f"{name} of {least:.3g} to {most:.3g}")
        return f"fitted on {' and '.join(outside)}" if outside else ""


def rule(flops: float) -> Best:
    """Hoffmann et al.'s rule: 20 tokens a parameter."""
    parameters = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
    return Best(parameters, TOKENS_PER_PARAMETER * parameters)


def read(file: str) -> Law:
    """The law in a JSON file; ConfigError in one line for what is none. Keys beyond the law's own, such as a fit's residuals, are its maker's."""
    plain = _plain(file)
    if plain.get("form") != FORM:
        raise ConfigError(f"law={file}", f"is no law: its form is {plain.get('form')!r}", f"the form known is {FORM!r}: {INSTEAD}")
    for name in CONSTANTS:
        if name not in plain:
            near = did_you_mean(name, set(plain) - {"form"} - set(CONSTANTS)) if set(plain) - {"form"} - set(CONSTANTS) else ""
            raise ConfigError(f"law={file}", f"is no law: it has no {name!r}", near if near.startswith("did") else INSTEAD)
        if not _positive(plain[name], least=0 if name == "E" else None):
            raise ConfigError(
                f"law={file}", f"is no law: {name} is {plain[name]!r}, not a {'number of at least 0' if name == 'E' else 'positive number'}", INSTEAD
            )
    law = Law(**{name: float(plain[name]) for name in CONSTANTS}, bounds=_bounds(plain.get("bounds"), file), source=str(plain.get("source") or ""))
    try:
        ends = [size for flops in REACH for best in [law.best(flops)] for size in (best.parameters, best.tokens)]
    except OverflowError:
        ends = [math.inf]
    if not all(0 < size < math.inf for size in ends):
        raise ConfigError(f"law={file}", "is no law: its constants give no finite compute-optimal size", INSTEAD)
    return law


def _plain(file: str) -> dict[str, Any]:
    try:
        if Path(file).stat().st_size > LARGEST_FILE:
            raise ConfigError(f"law={file}", f"is no law: it is larger than {LARGEST_FILE // 2**20} MiB", INSTEAD)
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"law={file}", f"cannot be read: {error.strerror}", "give a JSON file with the constants of a fit") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"law={file}", f"is no law: it is no JSON ({str(error)[:80]})", INSTEAD) from error
    if not isinstance(found, dict):
        raise ConfigError(f"law={file}", "is no law: it is no JSON object", INSTEAD)
    return found


def _positive(value: Any, least: float | None = None) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300 or not math.isfinite(value):
        return False
    return value > 0 if least is None else value >= least


def _bounds(plain: Any, file: str) -> dict[str, tuple[float, float]]:
    if plain is None:
        return {}
    if isinstance(plain, dict) and set(plain) <= {"N", "D"} and all(_is_range(one) for one in plain.values()):
        return {name: (float(low), float(high)) for name, (low, high) in plain.items()}
    raise ConfigError(f"law={file}", f"is no law: bounds are {str(plain)[:60]!r}", 'write "bounds": {"N": [least, most], "D": [least, most]}')


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_positive(one) for one in value) and value[0] <= value[1]


def said(law: Law | None, parameters: int, active: int, tokens: int, before: int | None = 0) -> Iterator[str]:
    """What the sizes of a pretraining mean, for people. `before` are the tokens of the pretraining it goes on from; None where nobody knows them."""
    total = tokens + (before or 0)
    more = f", {total / parameters:.3g} with those before" if before else ""
    yield f"{tokens / parameters:.3g} tokens a parameter{more}" + ("; how many its weights have seen before is not known" if before is None else "")
    if before is None:
        return
    flops = 6.0 * active * total
    best = law.best(flops) if law else rule(flops)
    by = "the law" if law else f"Hoffmann et al.'s rule of {TOKENS_PER_PARAMETER} tokens a parameter"
    yield f"compute-optimal for 6ND = {flops:.3g} FLOPs: {best.parameters:.3g} parameters on {best.tokens:.3g} tokens, by {by}"
    if law:
        outside = law.beyond(active, total)
        least = law.loss(best.parameters, best.tokens)
        yield f"expected loss {law.loss(active, total):.4g} nats a token, {least:.4g} at the optimum, by {law.source or 'the law'}" + (
            f"; beyond what it was {outside}" if outside else ""
        )
