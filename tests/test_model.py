import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, inputs, tiny_model
from flax import nnx

from dit.model import (BLOCKS, PRESETS, DiT, attend, count_parameters, multiply_adds, patchify, position_embedding, timestep_features,
                       unpatchify)

PAPER = {  # trainable parameters (recounted), and Table 4's Gflops
    "DiT-S/8": (33_142_016, 0.36), "DiT-S/4": (32_920_448, 1.41), "DiT-S/2": (32_865_056, 6.06),
    "DiT-B/8": (130_869_248, 1.42), "DiT-B/4": (130_426_496, 5.56), "DiT-B/2": (130_315_808, 23.01),
    "DiT-L/8": (458_578_432, 5.01), "DiT-L/4": (457_988_224, 19.70), "DiT-L/2": (457_840_672, 80.71),
    "DiT-XL/8": (675_664_640, 7.39), "DiT-XL/4": (675_000_704, 29.05), "DiT-XL/2": (674_834_720, 118.64)}
DESIGNS = {"in_context": (449, 119.37), "cross_attention": (598, 137.62), "adaln": (600, 118.56), "adaln_zero": (675, 118.64)}


def abstract(preset: str, **options) -> DiT:
    return jax.eval_shape(lambda: DiT(input_size=32, in_channels=4, num_classes=1000, **PRESETS[preset], **options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("preset", PAPER)
def test_presets_have_the_papers_size_and_cost(preset):
    parameters, gflops = PAPER[preset]
    assert count_parameters(abstract(preset)) == parameters
    assert multiply_adds(abstract(preset)) / 1e9 == pytest.approx(gflops, abs=0.03)


@pytest.mark.parametrize("design", DESIGNS)
def test_conditioning_designs_have_the_papers_size_and_cost(design):
    millions, gflops = DESIGNS[design]
    model = abstract("DiT-XL/2", conditioning=design)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.5)
    assert multiply_adds(model) / 1e9 == pytest.approx(gflops, abs=0.03)


@pytest.mark.parametrize("design", BLOCKS)
def test_multiply_adds_are_those_of_the_matrix_products_that_run(design):
    """Counted a second way, from the traced computation."""
    model = tiny_model(conditioning=design)

    def count(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contract, _), _ = eqn.params["dimension_numbers"]
                total += eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contract]))
            inner = [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"))
                     if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
            total += sum(count(getattr(p, "jaxpr", p)) for p in inner) * eqn.params.get("length", 1)
        return total

    assert count(jax.make_jaxpr(model)(*inputs(model, batch=1)).jaxpr) == multiply_adds(model)


def test_initial_standard_deviations():
    D, C, p, K = 64, 3, 2, 500
    model = DiT(input_size=4, patch_size=p, in_channels=C, hidden_size=D, depth=5, num_heads=4, num_classes=K, rngs=nnx.Rngs(0))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    xavier = lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5  # noqa: E731
    expected = {"patch_embed.kernel": xavier(p * p * C, D), "blocks.attention.qkv.kernel": (0.5 / D) ** 0.5,
                "blocks.attention.proj.kernel": xavier(D, D), "blocks.mlp.up.kernel": xavier(D, 4 * D), "blocks.mlp.down.kernel":
                xavier(4 * D, D), "label_embed.embedding": 0.02, "timestep_embed.fc1.kernel": 0.02, "timestep_embed.fc2.kernel": 0.02}
    for name, leaf in found.items():
        name = name.removesuffix(".value").removesuffix(".raw_value")
        if name in expected:
            deviation = expected.pop(name)
            assert float(leaf.std()) == pytest.approx(deviation, rel=5 / (2 * leaf.size) ** 0.5), name
            if "embed" not in name or "patch" in name:
                assert float(jnp.abs(leaf).max()) <= 3**0.5 * deviation * 1.0001, f"{name} is not uniform"
        else:
            assert not leaf.any(), name  # every bias, the modulations, the final layer
    assert not expected
    assert float(jnp.abs(model.blocks.mlp.up.kernel[0] - model.blocks.mlp.up.kernel[1]).max()) > 0, "layers start alike"


def test_patchify_is_undone_and_orders_a_patch_by_row_column_channel():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    np.testing.assert_array_equal(unpatchify(patchify(x, 3), 3), x)
    np.testing.assert_array_equal(patchify(x, 3)[1, 1], x[1, 0:3, 3:6].reshape(-1))


def test_positions_encode_the_column_first():
    table = position_embedding(3, 8).reshape(3, 3, 8)  # [row, column, D]
    np.testing.assert_allclose(table[2, 1], [*np.sin([1, 0.01]), *np.cos([1, 0.01]), *np.sin([2, 0.02]), *np.cos([2, 0.02])], rtol=1e-6)


def test_timestep_features_are_cosines_then_sines():
    features = timestep_features(jnp.array([0.0, 2.5]), 6)
    angles = 2.5 * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(features[0], [1, 1, 1, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(features[1], [*np.cos(angles), *np.sin(angles)], rtol=1e-6)


def test_attention_is_the_softmax_average():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 7))  # [B, T, N, D / N] each
    expected = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-6)
    np.testing.assert_allclose(attend(q, jnp.zeros_like(k), v)[:, 0], v.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("design", BLOCKS)
def test_scan_equals_a_loop_over_the_blocks(design):
    model = awaken(tiny_model(conditioning=design))
    x, t, y = inputs(model)
    tokens = model.patch_embed(patchify(x, 3)) + position_embedding(2, 20)
    c = model.condition(t, y)
    tokens = jnp.concatenate([tokens, c], axis=1) if design == "in_context" else tokens
    for i in range(model.depth):
        tokens = jax.tree.map(lambda leaf: leaf[i], model.blocks)(tokens, c)
    np.testing.assert_allclose(model(x, t, y), unpatchify(model.final(tokens[:, :4], c), 3), rtol=2e-5, atol=1e-5)


def test_a_mask_conditions_each_token_by_what_lies_around_it():
    model = tiny_model(mask_classes=2)
    x, t, y = inputs(model)
    mask = jnp.zeros((3, 6, 6), int)
    c = model.condition(t, (y, mask))
    assert c.shape == (3, 4, 20), "one vector a token"
    changed = jnp.abs(model.condition(t, (y, mask.at[:, 0, 0].set(1))) - c).max(axis=(0, 2))  # a corner, in the first patch of 2 x 2
    assert changed[0] > 1e-3 and (changed[1:] == 0).all()
    bare, null = tiny_model().condition(t, y), model.condition(t, (y, jnp.full((3, 6, 6), 2)))
    assert jnp.ptp(null[:, 1:], axis=1).max() < 1e-5 and bare.shape == (3, 1, 20), "the null mask says nothing of any place"


def test_with_masks_every_block_still_starts_as_the_identity_bit_for_bit():
    for dtype in (jnp.float32, jnp.bfloat16):
        model = tiny_model(mask_classes=3, dtype=dtype)
        x, t, y = inputs(model)
        c = model.condition(t, (y, jax.random.randint(jax.random.key(5), (3, 6, 6), 0, 4)))
        tokens = jax.random.normal(jax.random.key(6), (3, 4, 20)).astype(dtype)
        for i in range(model.depth):
            block = jax.tree.map(lambda leaf: leaf[i], model.blocks)
            np.testing.assert_array_equal(block(tokens, c), tokens)
        assert jnp.abs(awaken(model)(x, t, (y, jnp.zeros((3, 6, 6), int)))).max() > 0


def test_remat_changes_the_computation_and_not_the_result():
    plain, remat = awaken(tiny_model()), awaken(tiny_model(remat=True))
    x, t, y = inputs(plain)
    loss = lambda model: jnp.square(model(x, t, y)).sum()  # noqa: E731
    assert "remat" in str(jax.make_jaxpr(loss)(remat)) and "remat" not in str(jax.make_jaxpr(loss)(plain))
    for a, b in zip(jax.tree.leaves(jax.grad(loss)(plain)), jax.tree.leaves(jax.grad(loss)(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def test_condition_constant_in_space_equals_the_global_one_and_a_varying_one_acts_where_it_stands():
    model = awaken(tiny_model(), scale=0.3)
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    x, c = jax.random.normal(jax.random.key(3), (2, 4, 20)), jax.random.normal(jax.random.key(4), (2, 1, 20))
    np.testing.assert_allclose(block(x, c), block(x, jnp.broadcast_to(c, x.shape)), rtol=1e-5, atol=1e-5)
    gates_only = jax.tree.map(lambda leaf: leaf, block)
    gates_only.attention.proj.kernel = nnx.Param(jnp.zeros((20, 20)))  # no token sees another
    spatial = jnp.broadcast_to(c, x.shape)
    moved = jnp.abs(gates_only(x, spatial.at[:, 2].add(1.0)) - gates_only(x, spatial)).max(axis=(0, 2))
    assert (np.asarray(moved) > 0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("design", BLOCKS)
def test_samples_do_not_see_each_other(design):
    model = awaken(tiny_model(conditioning=design))
    x, t, y = inputs(model)
    gradient = jax.grad(lambda x: jnp.square(model(x, t, y)[1]).sum())(x)
    assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()


@pytest.mark.parametrize("design", BLOCKS)
def test_time_and_label_matter_and_the_null_class_is_num_classes(design):
    model = awaken(tiny_model(conditioning=design, num_classes=10))
    x, t, _ = inputs(model)
    assert model.label_embed.num_embeddings == 11
    out = [model(x, t, jnp.full(3, k)) for k in (0, 9, 10)]
    assert all(np.isfinite(o).all() for o in out)
    assert jnp.abs(out[0] - out[1]).max() > 1e-3 and jnp.abs(out[1] - out[2]).max() > 1e-3
    assert jnp.abs(model(x, t + 100, jnp.full(3, 0)) - out[0]).max() > 1e-3


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_output_in_float32():
    model, exact = awaken(tiny_model(jnp.bfloat16)), awaken(tiny_model())
    out, want = model(*inputs(model)), exact(*inputs(exact))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")} and out.dtype == jnp.float32
    assert "bf16" in str(jax.make_jaxpr(model)(*inputs(model)))
    assert 0 < float(jnp.abs(out - want).max()) < 0.1 * float(jnp.abs(want).max())


def test_without_learned_sigma_the_output_has_the_inputs_channels():
    model = tiny_model(learn_sigma=False)
    assert model(*inputs(model)).shape == (3, 6, 6, 2)
    assert tiny_model()(*inputs(model)).shape == (3, 6, 6, 4)
