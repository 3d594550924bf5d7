"""The arithmetic of meshes against torch's own."""

from __future__ import annotations

import itertools
import math

import pytest

from lmforge.parallel.layout import AXES, ONE, Ranks, chunk, coordinate, data_degree, stages

MESHES = [
    dict(zip(AXES, sizes, strict=True)) for sizes in ((1, 1, 1, 1, 1), (1, 1, 4, 1, 1), (2, 1, 2, 1, 2), (1, 2, 2, 2, 1), (3, 2, 1, 1, 2), (2, 2, 2, 2, 2))
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_ranks_are_numbered_as_torch_numbers_them(mesh: dict[str, int]) -> None:
    torch = pytest.importorskip("torch")
    device_mesh = pytest.importorskip("torch.distributed.device_mesh").DeviceMesh
    ranks = torch.arange(math.prod(mesh.values())).view(*mesh.values())  # what init_device_mesh gives the mesh
    made = device_mesh("cpu", ranks, mesh_dim_names=tuple(mesh), _init_backend=False, _rank=0)
    assert made.mesh_dim_names == AXES
    for rank in range(made.size()):
        at = coordinate(rank, mesh)
        assert tuple(at) == AXES
        assert made.mesh[tuple(at.values())] == rank
        assert list(at.values()) == (made.mesh == rank).nonzero()[0].tolist()


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_one_rank_speaks_for_each_share_of_the_rows(mesh: dict[str, int]) -> None:
    """Ranks of one dp coordinate read the same rows; of them one, in the last stage, counts its loss."""
    ranks = [Ranks(rank, mesh) for rank in range(math.prod(mesh.values()))]
    assert {one.data_degree for one in ranks} == {data_degree(mesh)} == {mesh["dp_replicate"] * mesh["dp_shard"]}
    by_share = {share: [one for one in ranks if one.data_rank == share] for share in range(data_degree(mesh))}
    assert {len(those) for those in by_share.values()} == {mesh["pp"] * mesh["cp"] * mesh["tp"]}
    for those in by_share.values():
        assert len({(one.at["dp_replicate"], one.at["dp_shard"]) for one in those}) == 1
        (speaker,) = [one for one in those if one.speaks]
        assert (speaker.at["pp"], speaker.at["cp"], speaker.at["tp"]) == (mesh["pp"] - 1, 0, 0)


def test_neighbours_in_tp_are_next_to_each_other() -> None:
    """Ranks of one machine have following numbers, and tp talks most."""
    mesh = ONE | {"pp": 2, "dp_shard": 2, "tp": 2}
    assert [(at["pp"], at["dp_shard"], at["tp"]) for at in (coordinate(rank, mesh) for rank in range(8))] == list(itertools.product(range(2), repeat=3))
    assert [Ranks(rank, mesh).data_rank for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert data_degree({}) == 1


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_chunk_is_torchs(parts: int) -> None:
    """torch.chunk gives fewer chunks where the last ones would be empty; here they have no rows."""
    torch = pytest.importorskip("torch")
    placement = pytest.importorskip("torch.distributed.tensor").Shard(0)
    for size in (1, 2, 3, 5, 8, 64, 97):
        rows = [chunk(size, parts, index) for index in range(parts)]
        assert sum(rows) == size
        expected = [len(one) for one in torch.arange(size).chunk(parts)]
        assert rows == expected + [0] * (parts - len(expected))
        assert rows == [placement._local_shard_size_and_offset(size, parts, index)[0] for index in range(parts)]


@pytest.mark.parametrize(("layers", "pp"), [(1, 1), (4, 2), (5, 2), (4, 4), (7, 4), (9, 4), (10, 4), (80, 12), (3, 3)])
def test_stages_hold_every_layer_once_as_equally_as_tensor_split(layers: int, pp: int) -> None:
    torch = pytest.importorskip("torch")
    found = stages(layers, pp)
    assert [layer for stage in found for layer in stage] == list(range(layers))
    assert sorted(map(len, found)) == sorted(len(part) for part in torch.arange(layers).tensor_split(pp))


@pytest.mark.parametrize(("layers", "pp", "sizes"), [(5, 2, [3, 2]), (7, 4, [2, 2, 2, 1]), (9, 4, [2, 3, 2, 2]), (10, 4, [2, 3, 3, 2]), (11, 4, [3, 3, 3, 2])])
def test_what_is_left_over_goes_to_the_ends_last(layers: int, pp: int, sizes: list[int]) -> None:
    """The last stage has the head and the first the embedding, so they carry fewer layers."""
    assert [len(stage) for stage in stages(layers, pp)] == sizes
