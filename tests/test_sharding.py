"""Where arrays lie, and work in equal parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, run_train, tiny_config

from dit import sharding
from dit.sharding import (
    batch_sharding,
    make_mesh,
    map_parts,
    mean_over_parts,
    num_parts,
    place_batch,
    place_rows,
    split_parts,
)
from dit.state import abstract_state

# The mesh


@pytest.mark.parametrize(
    "mesh, shape", [(dict(), (8, 1)), (dict(fsdp=4), (2, 4)), (dict(data=2, fsdp=4), (2, 4))]
)
def test_the_mesh_has_the_axes_that_were_asked_for(mesh, shape):
    assert make_mesh(tiny_config(mesh=mesh)).devices.shape == shape


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--train.batch-size 12", "train.batch_size: 12 should be a multiple of the 8 devices"),
        (
            "--train.batch-size 24 --optim.accumulate 2",
            "train.batch_size: 24 should be a multiple of the 8 devices times optim.accumulate = 2",
        ),
        (
            "--mesh.fsdp 3",
            "mesh.data and mesh.fsdp: (-1, 3) should be such that their product is the number "
            "of devices, 8",
        ),
        ("--mesh.data 2 --mesh.fsdp 2", "mesh.data and mesh.fsdp: (2, 2) should be such that"),
    ],
)
def test_devices_that_do_not_divide_are_refused(flags, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(run_train, *TINY, *flags.split())
    assert not list(tmp_path.iterdir())


# Where arrays lie


def spec(leaf: jax.ShapeDtypeStruct) -> tuple:
    return tuple(leaf.sharding.spec)


def test_the_rule_shards_the_largest_axis_that_divides_and_never_the_layers(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 100)
    more_layers_than_channels = dict(hidden_size=40, depth=80)
    config = tiny_config(model=more_layers_than_channels, mesh=dict(fsdp=8))
    state = abstract_state(config, make_mesh(config))
    model = state.model
    assert spec(model.blocks.attention.qkv.kernel) == (None, None, "fsdp")  # [80, 40, 120]
    assert spec(model.blocks.mlp.down.kernel) == (None, "fsdp", None)  # [80, 160, 40]
    assert spec(model.blocks.attention.proj.bias) == (None, "fsdp")  # [80, 40], 80 divides too
    assert spec(model.label_embed.embedding) == (None, "fsdp")  # [11, 40]
    assert spec(model.final.linear.bias) == (None,)  # small
    of_optimizer = [spec(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    assert of_optimizer.count((None, None, "fsdp")) >= 2


def test_tensors_of_fewer_than_16384_elements_stay_whole():
    mesh = make_mesh(tiny_config(mesh=dict(fsdp=8)))
    tree = {"small": jnp.zeros((8, 2047)), "large": jnp.zeros((8, 2048))}
    placed = sharding.shardings(tree, mesh)
    assert placed["small"].is_fully_replicated
    assert not placed["large"].is_fully_replicated


def test_without_fsdp_the_state_is_whole_on_every_device():
    config = tiny_config(model=dict(hidden_size=200))
    state = abstract_state(config, make_mesh(config))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def assert_spread(array: jax.Array) -> None:
    """Each of the eight devices holds an eighth of the rows."""
    rows = [shard.data.shape[0] for shard in array.addressable_shards]
    assert rows == [len(array) // 8] * 8
    starts = {shard.index[0].start or 0 for shard in array.addressable_shards}
    assert len(starts) == 8


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_batch_lies_in_order_over_all_devices(fsdp):
    batch = {"image": np.arange(48.0).reshape(16, 3), "label": np.arange(16)}
    placed = place_batch(batch, make_mesh(tiny_config(mesh=dict(fsdp=fsdp))))
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        assert_spread(placed[name])


@pytest.mark.parametrize("rows", [8, 11, 3])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_any_number_of_rows_is_padded_to_one_length_with_the_last(rows, fsdp):
    mesh = make_mesh(tiny_config(mesh=dict(fsdp=fsdp)))
    length = {8: 8, 11: 16, 3: 8}[rows]
    for count in range(1, rows + 1):
        tree = {"image": np.arange(1, 2 * count + 1).reshape(count, 2)}, np.arange(5, 5 + count)
        placed = place_rows(tree, rows, mesh)
        assert jax.tree.structure(placed) == jax.tree.structure(tree)
        for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
            repeated = before[-1:].repeat(length - count, axis=0)
            np.testing.assert_array_equal(after, np.concatenate([before, repeated]))
            assert_spread(after)


# Work in equal parts


@pytest.mark.parametrize(
    "rows, at_once, parts", [(12, 12, 1), (12, 100, 1), (12, 5, 3), (12, 1, 12), (7, 5, 7)]
)
def test_parts_are_the_fewest_equal_ones_that_are_small_enough(rows, at_once, parts):
    assert num_parts(rows, at_once) == parts


def test_where_nothing_fits_a_part_is_one_row():
    assert num_parts(5, 0) == 5


def test_each_device_has_its_share_of_every_part():
    mesh = make_mesh(tiny_config())
    rows = jax.device_put(jnp.arange(16), batch_sharding(mesh))
    owners = {int(row): shard.device for shard in rows.addressable_shards for row in shard.data}
    for part in split_parts(rows, 2):
        assert {owners[int(row)] for row in part} == set(jax.devices())


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_a_map_over_parts_is_that_of_the_whole_in_its_order(parts):
    x = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(map_parts(lambda rows: rows * 2, x, parts), x * 2)


def test_a_map_over_parts_runs_part_by_part():
    jaxpr = jax.make_jaxpr(lambda x: map_parts(jnp.sin, x, 3))(jnp.zeros((6, 2)))
    assert "f32[2,2] = sin" in str(jaxpr)


def moments(scale: float, rows: jax.Array) -> dict[str, jax.Array]:
    return {"mean": scale * rows.mean(), "square": jnp.square(rows).mean()}


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_a_mean_over_parts_is_that_of_the_whole(parts):
    x = jnp.arange(12.0).reshape(12, 1)
    means, expected = mean_over_parts(moments, 2.0, x, parts), moments(2.0, x)
    for name in expected:
        assert float(means[name]) == pytest.approx(float(expected[name]))


def test_a_mean_over_parts_runs_part_by_part():
    jaxpr = jax.make_jaxpr(lambda x: mean_over_parts(moments, 2.0, x, 3))(jnp.zeros((12, 1)))
    assert "f32[4,1] = square" in str(jaxpr)
    assert "f32[12,1] = square" not in str(jaxpr)
