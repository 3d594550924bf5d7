"""Seconds of collectives by their closed forms: latency times steps, and bytes over the slowest hop (the alpha-beta model).

Ranks are numbered with the last axis of the mesh fastest (parallel/layout.py), so tensor parallel stays in a node and neighbours along an axis lie as
many devices apart as the axes inside it have ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lmforge.hardware.nodes import Link
from lmforge.parallel.layout import AXES
from lmforge.predict.rates import Rates


def ring(ranks: int, size: float, link: Link) -> float:
    """An all-gather or a reduce-scatter of `size` bytes in all: n - 1 steps of size / n (Thakur, Rabenseifner, Gropp 2005, section 4.1)."""
    return (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def ring_all_reduce(ranks: int, size: float, link: Link) -> float:
    """A reduce-scatter and an all-gather: 2 (n - 1) steps (Patarasuk and Yuan 2009)."""
    return 2 * ring(ranks, size, link)


def tree_all_reduce(ranks: int, size: float, link: Link) -> float:
    """NCCL's double binary tree: up and down log2 n levels, each half of the bytes through one of two trees, so 2 x size is sent at full rate.

    (Sanders, Speck, Traeff 2009; NCCL 2.4.) Its steps grow with log n and a ring's with n, so it is the faster one for small messages and many nodes.
    """
    return 2 * (math.ceil(math.log2(ranks)) * link.latency + size / link.bandwidth) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Group:
    """The ranks of one axis: how many, how many of them in a node, and what a device of it has of the links."""

    ranks: int
    in_node: int
    link: Link  # what limits its bytes; latency of one step within the node
    between: float  # latency of a step between nodes; 0 where it has one node

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.in_node)

    def wait(self, *, tree: bool) -> float:
        """Latency of an all-gather's or a reduce-scatter's steps; for half an all-reduce (`tree`) NCCL takes a tree between nodes where that has fewer."""
        hops = self.nodes - 1
        far = min(hops, math.ceil(math.log2(self.nodes))) if tree and self.nodes > 1 else hops
        return far * self.between + (self.in_node - 1) * self.link.latency


def group(axis: str, mesh: Mapping[str, int], rates: Rates) -> Group:
    """The group of one axis. All groups that cross a node's border share its cards: a device's share is bandwidth / devices_per_node."""
    ranks = mesh[axis]
    apart = math.prod(mesh[name] for name in AXES[AXES.index(axis) + 1 :])
    node = rates.devices_per_node
    if ranks * apart <= node:
        assert rates.within is not None
        return Group(ranks, ranks, rates.within, 0.0)
    assert rates.between is not None
    in_node = max(1, node // apart)
    card = rates.between.bandwidth * in_node / node
    within = rates.within
    if in_node > 1 and within is not None:
        return Group(ranks, in_node, Link(bandwidth=min(within.bandwidth, card), latency=within.latency), rates.between.latency)
    return Group(ranks, in_node, Link(bandwidth=card, latency=0.0), rates.between.latency)


def collective(kind: str, sent: float, messages: float, among: Group) -> float:
    """Seconds of `messages` collectives in which a device sends `sent` bytes in all, counted as rings send them (parallel/traffic.py)."""
    if among.ranks == 1:
        return 0.0
    if kind == "send":
        return sent / among.link.bandwidth + messages * max(among.link.latency, among.between)
    steps = 2 * among.wait(tree=True) if kind == "all_reduce" else among.wait(tree=False)
    return sent / among.link.bandwidth + messages * steps


def beside(seconds: float, compute: float, exposed: float) -> float:
    """What shows of traffic that runs beside `compute`: all that is longer, and at least `exposed` of it, since it takes units and bandwidth from kernels."""
    return max(seconds - compute, seconds * exposed)
