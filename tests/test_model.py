"""The network: sizes, initialisation, and what each output depends on."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, block_of, equations, inputs, tiny_config, tiny_model
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import dit.model
from dit.config import InputError
from dit.model import (
    BLOCKS,
    MLP,
    PRESETS,
    AdaLNBlock,
    DiT,
    SelfAttention,
    attend,
    count_parameters,
    gelu,
    multiply_adds,
    patchify,
    position_embedding,
    timestep_features,
    unpatchify,
)
from dit.sharding import has_cudnn_attention, make_mesh, replicated
from dit.state import make_objective, make_state

# Trainable parameters (recounted), and Table 4's Gflops
PAPER = {
    "DiT-S/8": (33_142_016, 0.36),
    "DiT-S/4": (32_920_448, 1.41),
    "DiT-S/2": (32_865_056, 6.06),
    "DiT-B/8": (130_869_248, 1.42),
    "DiT-B/4": (130_426_496, 5.56),
    "DiT-B/2": (130_315_808, 23.01),
    "DiT-L/8": (458_578_432, 5.01),
    "DiT-L/4": (457_988_224, 19.70),
    "DiT-L/2": (457_840_672, 80.71),
    "DiT-XL/8": (675_664_640, 7.39),
    "DiT-XL/4": (675_000_704, 29.05),
    "DiT-XL/2": (674_834_720, 118.64),
}

# Millions of parameters and Gflops of DiT-XL/2
DESIGNS = {
    "in_context": (449, 119.37),
    "cross_attention": (598, 137.62),
    "adaln": (600, 118.56),
    "adaln_zero": (675, 118.64),
}


# Sizes and costs


def abstract(preset: str, **options) -> DiT:
    """The shapes of a preset's model on 32x32 latents of ImageNet."""

    def make() -> DiT:
        sizes = PRESETS[preset] | options
        return DiT(input_size=32, in_channels=4, num_classes=1000, **sizes, rngs=nnx.Rngs(0))

    return jax.eval_shape(make)


@pytest.mark.parametrize("preset", PAPER)
def test_presets_have_the_papers_size_and_cost(preset):
    parameters, gflops = PAPER[preset]
    model = abstract(preset)
    assert count_parameters(model) == parameters
    assert multiply_adds(model) / 1e9 == pytest.approx(gflops, abs=0.03)


@pytest.mark.parametrize("design", DESIGNS)
def test_designs_have_the_papers_size_and_cost(design):
    millions, gflops = DESIGNS[design]
    model = abstract("DiT-XL/2", conditioning=design)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.5)
    assert multiply_adds(model) / 1e9 == pytest.approx(gflops, abs=0.03)


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")


def traced_multiply_adds(jaxpr) -> int:
    """Multiply-adds of the matrix products and convolutions of a traced computation."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, outputs = equation.invars[0].aval, equation.outvars[0].aval.size
            total += outputs * int(np.prod([left.shape[axis] for axis in contracted]))
        if name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval
            out_channels = outputs.shape[-1]
            total += outputs.size * kernel.size // out_channels
        values = jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr)
        inner = sum(traced_multiply_adds(value) for value in values if is_jaxpr(value))
        total += inner * params.get("length", 1)  # of a scan
    return total


@pytest.mark.parametrize("design", BLOCKS)
def test_multiply_adds_are_those_of_the_traced_computation(design):
    model = tiny_model(conditioning=design)
    jaxpr = jax.make_jaxpr(model)(*inputs(model, batch=1))
    assert traced_multiply_adds(jaxpr) == multiply_adds(model)


def test_multiply_adds_count_the_label_of_augmentation():
    model = tiny_model(augment_size=5)
    x, t, y = inputs(model, batch=1)
    jaxpr = jax.make_jaxpr(model)(x, t, y, augment=jnp.ones((1, 5)))
    assert traced_multiply_adds(jaxpr) == multiply_adds(model)


def test_multiply_adds_count_the_masks_embedding_and_its_vector_for_each_token():
    model = tiny_model(mask_classes=3)
    mask = jnp.zeros((1, 6, 6), int)
    jaxpr = jax.make_jaxpr(model)(*inputs(model, batch=1), mask)
    assert traced_multiply_adds(jaxpr) == multiply_adds(model)


# Initialisation


def by_name(model: DiT) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def xavier_deviation(fan_in: int, fan_out: int) -> float:
    return (2 / (fan_in + fan_out)) ** 0.5


def test_initial_standard_deviations():
    D, C, p, K = 64, 3, 2, 500
    sizes = dict(input_size=4, patch_size=p, in_channels=C, num_classes=K)
    model = DiT(**sizes, hidden_size=D, depth=5, num_heads=4, rngs=nnx.Rngs(0))
    uniform = {
        "patch_embed.kernel": xavier_deviation(p * p * C, D),
        "blocks.attention.qkv.kernel": xavier_deviation(D, 3 * D),
        "blocks.attention.proj.kernel": xavier_deviation(D, D),
        "blocks.mlp.up.kernel": xavier_deviation(D, 4 * D),
        "blocks.mlp.down.kernel": xavier_deviation(4 * D, D),
    }
    normal = {
        "label_embed.embedding": 0.02,
        "timestep_embed.fc1.kernel": 0.02,
        "timestep_embed.fc2.kernel": 0.02,
    }
    parameters = by_name(model)
    assert parameters.keys() > uniform.keys() | normal.keys()
    for name, leaf in parameters.items():
        deviation = (uniform | normal).get(name, 0.0)  # 0: biases, modulations, final layer
        sampling_error = 5 / (2 * leaf.size) ** 0.5
        assert float(leaf.std()) == pytest.approx(deviation, rel=sampling_error), name
        assert deviation or not leaf.any(), name
        if name in uniform:
            assert float(jnp.abs(leaf).max()) <= 3**0.5 * deviation * 1.0001, name


def test_layers_start_unlike_each_other():
    kernel = tiny_model().blocks.mlp.up.kernel[...]
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.01


# Images, positions and times


def test_patchify_is_undone_and_orders_a_patch_by_row_column_channel():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    np.testing.assert_array_equal(unpatchify(patchify(x, 3), 3), x)
    top_right = x[1, 0:3, 3:6]
    np.testing.assert_array_equal(patchify(x, 3)[1, 1], top_right.reshape(-1))


def test_positions_encode_the_column_first():
    table = position_embedding(3, 8).reshape(3, 3, 8)  # [row, column, D]
    column = [*np.sin([1, 0.01]), *np.cos([1, 0.01])]
    row = [*np.sin([2, 0.02]), *np.cos([2, 0.02])]
    np.testing.assert_allclose(table[2, 1], column + row, rtol=1e-6)


def test_timestep_features_are_cosines_then_sines():
    features = timestep_features(jnp.array([0.0, 2.5]), 6)
    angles = 2.5 * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(features[0], [1, 1, 1, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(features[1], [*np.cos(angles), *np.sin(angles)], rtol=1e-6)


# The parts of the network


def test_attention_is_the_softmax_average():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 7))  # [B, T, N, D / N] each
    expected = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-6)
    uniform = attend(q, jnp.zeros_like(k), v)
    np.testing.assert_allclose(uniform[:, 0], v.mean(axis=1), atol=1e-6)


def test_gelu_is_float32_inside_and_keeps_its_input_alone():
    x = jnp.linspace(-4, 4, 97, dtype=jnp.bfloat16)
    exact = jax.nn.gelu(x.astype(jnp.float32), approximate=True)
    np.testing.assert_array_equal(gelu(x), exact.astype(jnp.bfloat16))
    _, derivative = jax.vjp(gelu, x)
    assert [leaf.dtype for leaf in jax.tree.leaves(derivative)] == [jnp.bfloat16]


@pytest.mark.parametrize("design", BLOCKS)
def test_one_time_for_all_is_that_time_for_each(design):
    model = awaken(tiny_model(conditioning=design))
    x, _, y = inputs(model)
    each = model(x, jnp.full(len(x), 49), y)
    np.testing.assert_allclose(model(x, jnp.array([49]), y), each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("design", BLOCKS)
def test_scan_equals_a_loop_over_the_blocks(design):
    model = awaken(tiny_model(conditioning=design))
    x, t, y = inputs(model)
    tokens = model.patch_embed(patchify(x, 3)) + position_embedding(2, 20)
    c = model.condition(t, y)
    if design == "in_context":
        tokens = jnp.concatenate([tokens, c], axis=1)
    for i in range(model.depth):
        tokens = block_of(model, i)(tokens, c)
    expected = unpatchify(model.final(tokens[:, :4], c), 3)
    np.testing.assert_allclose(model(x, t, y), expected, rtol=2e-5, atol=1e-5)


def test_remat_changes_the_computation_and_not_the_result():
    plain, remat = awaken(tiny_model()), awaken(tiny_model(remat="full"))
    x, t, y = inputs(plain)

    def loss(model: DiT) -> jax.Array:
        return jnp.square(model(x, t, y)).sum()

    once, twice = (
        len(equations(jax.make_jaxpr(jax.grad(loss))(model).jaxpr, "dot_general"))
        for model in (plain, remat)
    )
    assert twice > once
    grads, remat_grads = jax.grad(loss)(plain), jax.grad(loss)(remat)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(remat_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def loops_of_blocks(mesh: jax.sharding.Mesh | None, **changes) -> list[int]:
    """How many blocks a trip of each loop of the model has."""
    model = tiny_model(**changes)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        loops = equations(jax.make_jaxpr(model)(*inputs(model)).jaxpr, "scan")
    return [loop.params["unroll"] for loop in loops]


def test_one_cpu_takes_blocks_one_by_one_unless_they_are_many_or_repeated(monkeypatch):
    depth = tiny_model().depth
    one, two = (make_mesh(tiny_config(), jax.devices()[:n]) for n in (1, 2))
    assert loops_of_blocks(one) == [depth]
    assert loops_of_blocks(two) == loops_of_blocks(None) == [1]
    assert loops_of_blocks(one, remat="full") == [1]
    monkeypatch.setattr(dit.model, "SHALLOW", depth - 1)
    assert loops_of_blocks(one) == [1]


def test_blocks_one_by_one_and_in_a_loop_have_the_same_gradients():
    model = awaken(tiny_model())
    x, t, y = inputs(model)
    loss_and_grads = jax.value_and_grad(lambda model: jnp.square(model(x, t, y)).sum())
    in_a_loop = jax.jit(loss_and_grads)(model)
    mesh = make_mesh(tiny_config(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        one_by_one = jax.jit(loss_and_grads)(jax.device_put(model, replicated(mesh)))
    for a, b in zip(jax.tree.leaves(in_a_loop), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))


def test_remat_dots_repeats_no_product_of_a_linear_layer():
    def products(remat: str) -> int:
        model = awaken(tiny_model(remat=remat))
        x, t, y = inputs(model)
        grad = jax.grad(lambda model: model(x, t, y).sum())
        return str(jax.make_jaxpr(grad)(model)).count("dot_general")

    assert products("dots") == products("none") + 2  # those of attention
    assert products("full") >= products("dots") + 4  # qkv, proj, up, modulation; down is not needed


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_output_in_float32():
    model, exact = awaken(tiny_model(jnp.bfloat16)), awaken(tiny_model())
    output, expected = model(*inputs(model)), exact(*inputs(exact))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert output.dtype == jnp.float32
    assert "bf16" in str(jax.make_jaxpr(model)(*inputs(model)))
    difference, size = jnp.abs(output - expected).max(), jnp.abs(expected).max()
    assert 0 < float(difference) < 0.1 * float(size)


def test_without_learned_sigma_the_output_has_the_inputs_channels():
    model = tiny_model(learn_sigma=False)
    assert model(*inputs(model)).shape == (3, 6, 6, 2)
    model = tiny_model()
    assert model(*inputs(model)).shape == (3, 6, 6, 4)


# What an output depends on


@pytest.mark.parametrize("design", BLOCKS)
def test_samples_do_not_see_each_other(design):
    model = awaken(tiny_model(conditioning=design))
    x, t, y = inputs(model)
    gradient = jax.grad(lambda x: jnp.square(model(x, t, y)[1]).sum())(x)
    assert [bool(of_sample.any()) for of_sample in gradient] == [False, True, False]


@pytest.mark.parametrize("design", BLOCKS)
def test_time_and_label_matter_and_the_null_class_is_num_classes(design):
    model = awaken(tiny_model(conditioning=design, num_classes=10))
    x, t, _ = inputs(model)
    first, last, null = (model(x, t, jnp.full(3, label)) for label in (0, 9, 10))
    later = model(x, t + 100, jnp.full(3, 0))
    assert model.label_embed.num_embeddings == 11
    assert np.isfinite([first, last, null, later]).all()
    assert jnp.abs(first - last).max() > 1e-3
    assert jnp.abs(last - null).max() > 1e-3
    assert jnp.abs(first - later).max() > 1e-3


@pytest.mark.parametrize("design", ["adaln_zero", "in_context"])
def test_a_one_hot_weight_is_its_label_and_a_mixture_the_mean_of_embeddings(design):
    model = awaken(tiny_model(conditioning=design))
    x, t, y = inputs(model)
    one_hot = jax.nn.one_hot(y, 8)
    np.testing.assert_array_equal(model.embed_label(one_hot), model.embed_label(y))
    np.testing.assert_allclose(model(x, t, one_hot), model(x, t, y), rtol=1e-6, atol=1e-6)
    table = model.label_embed.embedding[...]
    mixed = model.embed_label(jnp.array([[0, 0, 0.25, 0, 0, 0, 0, 0.75]]))
    np.testing.assert_allclose(mixed[0], table[2] / 4 + 3 * table[7] / 4, rtol=1e-6)


@pytest.mark.parametrize("parts", [SelfAttention, MLP])
def test_a_block_of_ones_own_takes_a_class_and_one_line(monkeypatch, parts):
    """It says itself whether it is adaptive, and its products are counted."""

    class Part(AdaLNBlock):
        adaptive = parts is MLP

        def __init__(self, hidden_size, num_heads, mlp_ratio, *, dtype, rngs):
            size = mlp_ratio if parts is MLP else num_heads
            self.part = parts(hidden_size, size, dtype=dtype, rngs=rngs)

        def __call__(self, x, c):
            return x + self.part(x) + c.mean(axis=1, keepdims=True)

    monkeypatch.setitem(BLOCKS, "part", Part)
    model = awaken(tiny_model(conditioning="part"))
    assert model.adaptive == (parts is MLP)
    shape = jax.eval_shape(model.condition, *inputs(model)[1:]).shape
    assert shape == (3, 1 if model.adaptive else 2, 20)
    jaxpr = jax.make_jaxpr(model)(*inputs(model, batch=1))
    assert traced_multiply_adds(jaxpr) == multiply_adds(model)


def test_blocks_that_there_are_not_and_masks_that_a_block_takes_not_are_refused():
    with pytest.raises(InputError) as refusal:
        tiny_model(conditioning="film")
    expected = "'film' should be one of adaln_zero, adaln, cross_attention, in_context"
    assert str(refusal.value) == f"model.conditioning: {expected}"
    for design in ("cross_attention", "in_context"):
        with pytest.raises(InputError, match="data.mask_classes: 2 should be 0 with model.condit"):
            tiny_model(conditioning=design, mask_classes=2)


def test_a_condition_constant_in_space_equals_the_global_one():
    block = block_of(awaken(tiny_model(), scale=0.3), 0)
    x = jax.random.normal(jax.random.key(3), (2, 4, 20))
    c = jax.random.normal(jax.random.key(4), (2, 1, 20))
    spatial = jnp.broadcast_to(c, x.shape)
    np.testing.assert_allclose(block(x, c), block(x, spatial), rtol=1e-5, atol=1e-5)


def test_a_condition_that_varies_in_space_acts_where_it_stands():
    block = block_of(awaken(tiny_model(), scale=0.3), 0)
    block.attention.proj.kernel = nnx.Param(jnp.zeros((20, 20)))  # no token sees another
    x = jax.random.normal(jax.random.key(3), (2, 4, 20))
    c = jax.random.normal(jax.random.key(4), (2, 4, 20))
    moved = jnp.abs(block(x, c.at[:, 2].add(1.0)) - block(x, c)).max(axis=(0, 2))
    assert (np.asarray(moved) > 0).tolist() == [False, False, True, False]


# The label of augmentation


@pytest.mark.parametrize("design", BLOCKS)
def test_the_label_of_augmentation_adds_nothing_at_first_and_nothing_ever_where_it_is_zero(design):
    bare = tiny_model(conditioning=design)
    model = tiny_model(conditioning=design, augment_size=5)
    assert count_parameters(model) == count_parameters(bare) + 5 * 20
    for name, leaf in by_name(bare).items():
        np.testing.assert_array_equal(by_name(model)[name], leaf)
    _, t, y = inputs(model)
    labels = jax.random.normal(jax.random.key(7), (3, 5))
    at_first = model.condition(t, y, augment=labels)
    np.testing.assert_array_equal(at_first, bare.condition(t, y))
    model = awaken(model)
    x, t, y = inputs(model)
    without = model(x, t, y)
    np.testing.assert_array_equal(model(x, t, y, augment=jnp.zeros((3, 5))), without)
    assert jnp.abs(model(x, t, y, augment=labels) - without).max() > 1e-3


# Masks


def test_a_mask_conditions_each_token_by_what_lies_around_it():
    model = tiny_model(mask_classes=2)
    _, t, y = inputs(model)
    mask = jnp.zeros((3, 6, 6), int)
    corner = mask.at[:, 0, 0].set(1)  # in the first patch of 2 x 2
    c = model.condition(t, y, mask)
    assert c.shape == (3, 4, 20), "one vector a token"
    changed = jnp.abs(model.condition(t, y, corner) - c).max(axis=(0, 2))
    assert changed[0] > 1e-3
    assert not changed[1:].any()


def test_the_null_mask_adds_nothing():
    bare, model = tiny_model(), tiny_model(mask_classes=2)
    _, t, y = inputs(model)
    null = model.condition(t, y, jnp.full((3, 6, 6), 2))
    np.testing.assert_array_equal(null, jnp.broadcast_to(bare.condition(t, y), null.shape))
    awake = awaken(model).condition(t, y, jnp.full((3, 6, 6), 2))
    assert jnp.ptp(awake, axis=1).max() < 1e-5, "the same for every token, whatever the biases"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_with_masks_every_block_starts_as_the_identity_bit_for_bit(dtype):
    model = tiny_model(mask_classes=3, dtype=dtype)
    x, t, y = inputs(model)
    mask = jax.random.randint(jax.random.key(5), (3, 6, 6), 0, 4)
    tokens = jax.random.normal(jax.random.key(6), (3, 4, 20))
    c = model.condition(t, y, mask)
    for i in range(model.depth):
        np.testing.assert_array_equal(block_of(model, i)(tokens, c), tokens)
    assert not model(x, t, y, mask).any()
    assert awaken(model)(x, t, y, mask).any()


# Precision


def is_bfloat16(equation) -> bool:
    return any(var.aval.dtype == jnp.bfloat16 for var in equation.invars)


def scans_of_blocks(model: DiT) -> list:
    """The loops over the blocks in a traced forward pass."""
    jaxpr = jax.make_jaxpr(model)(*inputs(model))
    return [e for e in equations(jaxpr, "scan") if e.params["length"] == model.depth]


@pytest.mark.parametrize("design", BLOCKS)
def test_in_bfloat16_the_residual_stream_is_float32(design):
    model = tiny_model(jnp.bfloat16, conditioning=design)
    (scan,) = scans_of_blocks(model)
    (carry,) = scan.outvars
    assert carry.aval.shape[0] == 3 and carry.aval.shape[-1] == 20  # [B, T, D]
    assert carry.aval.dtype == jnp.float32
    x, c = jnp.zeros((3, 4, 20)), jnp.zeros((3, 2, 20))[:, : 1 if model.adaptive else 2]
    assert jax.eval_shape(block_of(model, 0), x, c).dtype == jnp.float32


@pytest.mark.parametrize("design", BLOCKS)
def test_in_bfloat16_every_product_of_a_block_is_and_none_before_or_behind_it(design):
    model = tiny_model(jnp.bfloat16, conditioning=design)
    (scan,) = scans_of_blocks(model)
    in_blocks = equations(scan.params["jaxpr"], "dot_general")
    everywhere = equations(jax.make_jaxpr(model)(*inputs(model)), "dot_general")
    attentions = 2 if design == "cross_attention" else 1
    linear = {"adaln_zero": 5, "adaln": 5, "cross_attention": 7, "in_context": 4}[design]
    assert len(in_blocks) == linear + 2 * attentions
    assert all(is_bfloat16(product) for product in in_blocks)
    assert sum(is_bfloat16(product) for product in everywhere) == len(in_blocks)
    assert len(everywhere) > len(in_blocks)


def test_with_masks_too_the_embeddings_are_float32():
    model = tiny_model(jnp.bfloat16, mask_classes=2)
    t, y, mask = jnp.zeros(3), jnp.zeros(3, int), jnp.zeros((3, 6, 6), int)
    found = equations(
        jax.make_jaxpr(model.condition)(t, y, mask), "dot_general", "conv_general_dilated"
    )
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found) == 4  # fc1 and fc2, the convolution and the linear layer
    assert not any(is_bfloat16(product) for product in found)
    assert {product.params["precision"] for product in found} == {highest}


@pytest.mark.parametrize("design", BLOCKS)
def test_in_float32_every_product_is_of_the_highest_precision(design):
    model = tiny_model(conditioning=design)

    def loss(model: DiT, x, t, y) -> jax.Array:
        return model(x, t, y).sum()

    found = equations(jax.make_jaxpr(jax.grad(loss))(model, *inputs(model)), "dot_general")
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found) > 20
    assert {product.params["precision"] for product in found} == {highest}


@pytest.mark.parametrize("design", BLOCKS)
def test_softmax_and_norms_are_float32_in_bfloat16(design):
    model = tiny_model(jnp.bfloat16, conditioning=design)
    jaxpr = jax.make_jaxpr(model)(*inputs(model))
    found = equations(jaxpr, "exp", "reduce_max", "rsqrt", "reduce_sum", "div", "square")
    assert {"exp", "reduce_max", "rsqrt"} <= {equation.primitive.name for equation in found}
    assert not any(is_bfloat16(equation) for equation in found)


def test_shift_scale_and_gate_are_float32_whatever_the_type_of_their_product():
    block = block_of(tiny_model(jnp.bfloat16), 0)
    vectors = jax.eval_shape(block.modulation, jnp.zeros((3, 1, 20)))
    assert {vector.dtype for vector in vectors} == {jnp.dtype("float32")}


def test_the_loss_and_its_gradients_are_float32_in_bfloat16():
    config = tiny_config(train=dict(dtype="bfloat16"))
    state = jax.eval_shape(lambda: make_state(config, make_mesh(config)))
    x, y = jnp.zeros((3, 8, 8, 1)), jnp.zeros(3, int)
    objective = make_objective(config)
    loss_and_grads = jax.value_and_grad(objective.loss, has_aux=True)
    key = jax.random.key(0)
    (loss, metrics), grads = jax.eval_shape(loss_and_grads, state.model, key, x, {"y": y})
    assert state.model.dtype == "bfloat16"
    leaves = [loss, *metrics.values(), *jax.tree.leaves(grads)]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_the_rounding_errors_of_bfloat16_do_not_add_up_over_28_layers():
    sizes = dict(depth=28, hidden_size=64, num_heads=4)
    exact = jax.jit(lambda: awaken(tiny_model(**sizes), scale=0.02))()
    in_bfloat16 = jax.eval_shape(lambda: tiny_model(jnp.bfloat16, **sizes))
    model = jax.tree.unflatten(jax.tree.structure(in_bfloat16), jax.tree.leaves(exact))
    batch = inputs(exact)
    expected = jax.jit(exact)(*batch)
    error = jnp.linalg.norm(jax.jit(model)(*batch) - expected) / jnp.linalg.norm(expected)
    assert 1e-5 < float(error) < 5e-3


# Which attention


def heads(T=6, S=6, head_dim=16, dtype=jnp.bfloat16) -> tuple:
    """q `[2, T, 3, head_dim]`, k and v `[2, S, 3, head_dim]`, abstract."""
    q = jax.ShapeDtypeStruct((2, T, 3, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, S, 3, head_dim), dtype)
    return q, k, k


@pytest.fixture
def cudnn(monkeypatch):
    """As if the devices were GPUs with a cuDNN."""
    monkeypatch.setattr(dit.model, "has_cudnn_attention", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_200)


def lowered_attention(*heads) -> str:
    """Of the attention and its derivative, for an NVIDIA GPU."""
    grad = jax.grad(lambda *heads: attend(*heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(grad).trace(*heads).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "options", [dict(), dict(T=256, S=2), dict(T=2), dict(head_dim=8), dict(head_dim=128)]
)
def test_cudnn_fuses_the_attention_that_it_can(options, cudnn):
    text = lowered_attention(*heads(**options))
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text


@pytest.mark.parametrize(
    "options",
    [
        dict(T=49, S=49),
        dict(T=49),
        dict(S=49),
        dict(dtype=jnp.float32),
        dict(head_dim=20),
        dict(head_dim=136),
    ],
)
def test_the_attention_that_cudnn_cannot_fuse_is_computed_without_it(options, cudnn):
    text = lowered_attention(*heads(**options))
    assert "__cudnn" not in text
    assert "dot_general" in text


def test_without_cudnn_nothing_is_left_to_it():
    assert "__cudnn" not in lowered_attention(*heads())


# Where cuDNN is


class Device:
    """A device of which only this is asked."""

    def __init__(self, platform: str, compute_capability: str = ""):
        self.platform = platform
        if compute_capability:
            self.compute_capability = compute_capability


def test_cpus_have_no_cudnn():
    assert not has_cudnn_attention()
    with jax.set_mesh(make_mesh(tiny_config())):
        assert not has_cudnn_attention()


@pytest.mark.parametrize(
    "kind, platform, found", [("NVIDIA H100", "gpu", True), ("TPU v5 lite", "tpu", False)]
)
def test_a_mesh_of_devices_that_are_not_here_decides_by_their_platform(kind, platform, found):
    device = AbstractDevice(device_kind=kind, platform=platform, num_cores=None)
    axis_types = (AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 4), ("data", "fsdp"), axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert has_cudnn_attention() == found


@pytest.mark.parametrize("capability, found", [("7.5", False), ("8.0", True), ("12.0", True)])
def test_a_gpu_has_it_from_compute_capability_8(capability, found, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("gpu", capability)])
    assert has_cudnn_attention() == found
