"""Collectives by their closed forms, and which links an axis of the mesh has."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lmforge.hardware.nodes import Link, Machine
from lmforge.parallel.layout import ONE
from lmforge.predict.links import beside, collective, group, ring, ring_all_reduce, tree_all_reduce
from lmforge.predict.rates import Rates, rates
from tests.predict.machines import machine

FAST = Link(bandwidth=1e9, latency=1e-5)


def test_ring_and_tree() -> None:
    """n - 1 steps of 1/n of the bytes, twice in an all-reduce; a tree's steps grow with log2 n."""
    assert ring(4, 4e9, FAST) == pytest.approx(3 * (1e-5 + 1.0))
    assert ring_all_reduce(4, 4e9, FAST) == 2 * ring(4, 4e9, FAST)
    assert tree_all_reduce(1024, 0, FAST) == pytest.approx(2 * 10 * 1e-5)
    assert tree_all_reduce(1024, 1e3, FAST) < ring_all_reduce(1024, 1e3, FAST)
    assert ring_all_reduce(4, 1e9, FAST) < tree_all_reduce(4, 1e9, FAST)
    assert ring(1, 1e9, FAST) == tree_all_reduce(1, 1e9, FAST) == 0


def got(**change: int) -> Rates:
    made: Machine = machine("h100x512")
    return rates(dataclasses.replace(made, **change), "bfloat16", made.devices)


def test_a_group_within_a_node_has_the_links_within() -> None:
    found = group("tp", ONE | {"tp": 8, "dp_shard": 64}, got())
    assert found.nodes == 1
    assert found.link.bandwidth == pytest.approx(0.8 * 450e9)
    sent = 7 / 8 * 1e9
    assert collective("all_gather", sent, 1, found) == pytest.approx(ring(8, 1e9, found.link))
    assert collective("all_reduce", 2 * sent, 1, found) == pytest.approx(ring_all_reduce(8, 1e9, found.link))


def test_groups_that_cross_nodes_share_their_cards() -> None:
    """Eight data-parallel groups of tp=8 each have an eighth of a node's cards; one group of all has all of them."""
    many = group("dp_shard", ONE | {"tp": 8, "dp_shard": 64}, got())
    assert many.in_node == 1
    assert many.nodes == 64
    assert many.link.bandwidth == pytest.approx(0.8 * 400e9 / 8)
    whole = group("dp_shard", ONE | {"dp_shard": 512}, got())
    assert whole.in_node == 8
    assert whole.link.bandwidth == pytest.approx(0.8 * 400e9)


def test_a_tree_keeps_many_nodes_from_waiting() -> None:
    """An all-reduce over 64 nodes waits log2 of them, where a ring would wait for 63."""
    found = group("dp_replicate", ONE | {"dp_replicate": 512}, got())
    assert found.wait(tree=True) == pytest.approx(math.log2(64) * 8e-6 + 7 * 3e-6)
    assert found.wait(tree=False) == pytest.approx(63 * 8e-6 + 7 * 3e-6)


def test_one_rank_sends_nothing() -> None:
    assert collective("all_gather", 0, 5, group("dp_shard", ONE, got())) == 0


def test_traffic_hides_behind_compute_but_for_a_share() -> None:
    assert beside(1.0, 10.0, 0.8) == 0.8
    assert beside(10.0, 1.0, 0.8) == 9.0
    assert beside(1.0, 10.0, 0.0) == 0.0
