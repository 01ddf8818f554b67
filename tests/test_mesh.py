"""Places in the mesh: every rank in exactly one group of each kind, neighbours where the talk is."""

from __future__ import annotations

import itertools

import pytest

from crossdock.parallel.mesh import AXES, MeshShape, describe

SHAPES = [
    MeshShape(dp=dp, cfg=cfg, ring=ring, ulysses=ulysses, tp=tp)
    for dp, cfg, ring, ulysses, tp in itertools.product((1, 2), (1, 2), (1, 2, 3), (1, 2), (1, 2))
]


@pytest.mark.parametrize("shape", SHAPES, ids=describe)
def test_groups_partition_the_world(shape: MeshShape) -> None:
    for name in ("tp", "ulysses", "ring", "sequence", "replica", "weights"):
        groups = {shape.groups(rank)[name] for rank in range(shape.world_size)}
        assert sorted(itertools.chain(*groups)) == list(range(shape.world_size))
        assert all(rank in shape.groups(rank)[name] for rank in range(shape.world_size))


@pytest.mark.parametrize("shape", SHAPES, ids=describe)
def test_coordinates_count_outer_to_inner(shape: MeshShape) -> None:
    places = [tuple(shape.coordinates(rank)[axis] for axis in AXES) for rank in range(shape.world_size)]
    assert places == sorted(places) == list(itertools.product(*(range(shape.degree(axis)) for axis in AXES)))


def test_tensor_parallel_ranks_are_neighbours() -> None:
    """Pitfall 7: the Ulysses group is not the TP group when TP is the inner axis."""
    shape = MeshShape(ring=2, ulysses=2, tp=2)
    assert shape.groups(0) == {
        "tp": (0, 1),
        "cfg": (0,),
        "ulysses": (0, 2),
        "ring": (0, 4),
        "sequence": (0, 2, 4, 6),
        "replica": (0, 1, 2, 3, 4, 5, 6, 7),
        "weights": (0,),
    }
    assert [shape.sequence_index(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("shard", [1, 2, 4])
def test_shards_are_held_by_ranks_of_one_slice(shard: int) -> None:
    """HSDP composes with TP: a shard group never mixes two TP slices."""
    shape = MeshShape(dp=2, ulysses=2, tp=2, hsdp_shard=shard)
    for rank in range(shape.world_size):
        group = shape.shard_group(rank)
        assert len(group) == shard
        assert {shape.coordinates(other)["tp"] for other in group} == {shape.coordinates(rank)["tp"]}
    assert MeshShape(dp=2, ulysses=2, tp=2, hsdp_shard=2).shard_group(5) == (5, 7)


def test_a_shard_count_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"hsdp\.shard 3 does not divide the 4 ranks"):
        MeshShape(dp=4, hsdp_shard=3)


def test_describe() -> None:
    assert describe(MeshShape()) == "one rank"
    assert describe(MeshShape(ring=2, ulysses=2)) == "ring 2 x ulysses 2"
    assert describe(MeshShape(dp=4, hsdp_shard=2)) == "dp 4 x hsdp 2x2"
