import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, show_condition, tiny_config

from dit import generation
from dit.config import SAMPLERS, Config, InputError, Stopped, replace
from dit.data import Dataset, InMemory, open_dataset
from dit.files import claim_folder
from dit.images import from_uint8, to_uint8
from dit.program import collectives
from dit.sharding import local_mesh, make_mesh, place_rows, replicated
from dit.state import make_model, make_objective
from dit.tfds import imagenet_names

DDIM = dict(sampler="ddim", steps=3)
DDPM = dict(sampler="ddpm", steps=3)
EULER = dict(sampler="euler", steps=3)
HEUN = dict(sampler="heun", steps=3)


def config_for(options, **sections) -> Config:
    """The tiny config of the objective that a sampler is for."""
    if options["sampler"] in SAMPLERS["flow"]:
        sections = {"objective": dict(name="flow", prediction="x0")} | sections
    return tiny_config(**sections)


@functools.cache
def awake_model(config: Config | None = None):
    """A model of a config, the tiny one if none is given, without zeros, on all devices."""
    model = awaken(make_model(config or tiny_config(), jax.random.key(0)), 0.05)
    return jax.device_put(model, replicated(local_mesh()))


def draw_all(config, model, condition, batch_size=1000, mesh=None, vae=None, **options):
    """Every sample that a condition describes, as integers that can be subtracted."""
    draw = generation.make_draw(config, mesh or local_mesh(), condition, batch_size, **options)
    images = generation.draw_all(draw, model, vae, len(condition["y"]), batch_size)
    return images.astype(int)


def some_digits(count=11) -> dict[str, np.ndarray]:
    return generation.make_condition(np.arange(count) % 10, tiny_config())


def shown_config(options=DDIM, **sections) -> Config:
    """Of `show_condition`: the brightness of every pixel is known in advance."""
    config = config_for(options, **sections)
    return replace(config, objective=dict(variance="fixed_small"))


def brightness(y, mask=None):
    """That of a label and its mask, `[B, H, W, 1]`; guided by 2 it is still within [-1, 1]."""
    shade = 0.05 * y.reshape(-1, 1, 1, 1)
    return shade if mask is None else shade - 0.1 * mask[..., None]


def bytes_of(x0) -> np.ndarray:
    return np.asarray(to_uint8(jnp.asarray(x0, jnp.float32)), int)


# What to draw


@pytest.mark.parametrize("num_classes", [1, 2, 9, 10, 11, 37, 100, 1000])
def test_at_most_ten_classes_are_spread_from_the_first_to_the_last(num_classes):
    classes = generation.spread_classes(num_classes)
    assert len(classes) == min(num_classes, 10)
    assert classes[0] == 0
    assert classes[-1] == num_classes - 1
    steps = np.diff(classes)
    assert (steps > 0).all()
    assert len(steps) == 0 or np.ptp(steps) <= 1
    assert generation.spread_classes(num_classes, num_classes) == list(range(num_classes))


def test_a_random_label_is_a_function_of_seed_and_index():
    classes = np.array([2, 3, 5, 7])
    labels = generation.draw_labels("random", 0, classes, 400)
    assert labels.dtype == np.int32
    assert set(labels) == set(classes)
    assert np.bincount(labels).max() < 150
    np.testing.assert_array_equal(generation.draw_labels("random", 0, classes, 41), labels[:41])
    assert (generation.draw_labels("random", 1, classes, 400) != labels).mean() > 0.5


def test_no_timestep_shares_its_key_with_the_label():
    longest = Config().objective.num_steps * 1000
    assert longest < generation.LABEL_TAG < 2**32


def test_a_condition_has_the_null_mask_where_the_model_has_masks_and_none_is_given():
    labels = [3, 5]
    plain = generation.make_condition(labels, tiny_config())
    assert plain.keys() == {"y"}
    assert plain["y"].dtype == np.int32

    config = tiny_config(data=dict(mask_classes=2))
    null = generation.make_condition(labels, config)
    np.testing.assert_array_equal(null["y"], labels)
    np.testing.assert_array_equal(null["mask"], np.full((2, 8, 8), 2))
    one = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2
    shared = generation.make_condition(labels, config, one)
    np.testing.assert_array_equal(shared["mask"], [one, one])
    each = generation.make_condition(labels, config, np.stack([one, 1 - one]))
    np.testing.assert_array_equal(each["mask"], [one, 1 - one])


@pytest.mark.parametrize(
    "labels, words",
    [
        ([3, 11], r"labels: \[3, 11\] should be integers from 0 to 9, or 10, the null class"),
        ([-1], "should be integers from 0 to 9"),
        ([0.5], "should be integers from 0 to 9"),
        ([], "should be integers from 0 to 9"),
        (np.ones((2, 10)), r"labels: \(2, 10\) should be of the shape \(2, 11\)"),
    ],
)
def test_labels_that_the_model_has_not_are_refused(labels, words):
    with pytest.raises(InputError, match=words):
        generation.make_condition(labels, tiny_config())


def test_mixtures_go_from_one_class_to_the_other_in_equal_steps():
    weights = generation.mixtures(2, 0, 5, 3)
    shares = [0, 0.25, 0.5, 0.75, 1]
    expected = [[share, 0, 1 - share, 0] for share in shares]
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(generation.mixtures(1, 1, 2, 3), [[0, 1, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("options", [DDIM, HEUN])
def test_generate_draws_what_the_pieces_draw_of_labels_and_of_weights(options):
    config = config_for(options)
    model = jax.device_put(awake_model(config), jax.devices()[0])
    labels = np.array([3, 8, 3])
    images = generation.generate(model, config, labels.tolist(), guidance=2.0, seed=7, **options)
    condition = generation.make_condition(labels, config)
    expected = draw_all(config, awake_model(config), condition, guidance=2.0, seed=7, **options)
    np.testing.assert_array_equal(images, expected)
    assert images.dtype == np.uint8
    soft = np.eye(11)[labels]
    mixed = generation.generate(model, config, soft, guidance=2.0, seed=7, **options)
    np.testing.assert_allclose(mixed.astype(int), expected, atol=1)

    frames = generation.generate(
        model, config, labels, guidance=2.0, seed=7, frames=3, batch_size=8, **options
    )
    assert frames.shape == (3, 3, 8, 8, 1)
    np.testing.assert_allclose(frames[:, -1].astype(int), expected, atol=1)
    assert len(generation.noise_levels(config, 3, 3)) == 3
    same = generation.generate(model, config, labels, same_noise=True, **options)
    np.testing.assert_array_equal(same[0], same[2])
    assert (images[0] != images[2]).any()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(sampler="euler"), "sampler: 'euler' should be ddim or ddpm"),
        (dict(steps=102), "steps: 102 should be from 1 to the model's 101 timesteps"),
        (dict(vae="vae"), "vae: 'str' should be given, as by dit.load_vae"),
    ],
)
def test_generate_refuses_what_the_model_cannot_do(options, words):
    with pytest.raises(InputError, match=words):
        generation.generate(None, tiny_config(), [3], **options)


def test_example_masks_are_of_images_of_the_class_asked_for():
    labels = np.array([0, 1, 0, 1, 0], np.int32)
    masks = np.arange(5, dtype=np.uint8).reshape(5, 1, 1).repeat(4, axis=1).repeat(4, axis=2)
    dataset = Dataset(InMemory(np.zeros((5, 4, 4, 1), np.uint8), labels, masks), ("a", "b", "c"))
    asked = np.array([1, 1, 1, 0, 0, 0, 2])
    shown = generation.example_masks(dataset, asked)
    assert shown.shape == (7, 4, 4)
    of_image = shown[:, 0, 0]
    np.testing.assert_array_equal(labels[of_image[:6]], asked[:6])
    assert len(set(of_image[3:6])) > 1, "not one mask for all"


def test_short_names_have_no_synonyms():
    names = generation.short_names([0, 1], imagenet_names())
    assert names == ["tench", "goldfish"]


# Guidance and the null condition


@pytest.mark.parametrize("options", [DDIM, DDPM, EULER, HEUN])
def test_the_samples_are_guided_away_from_the_null_class(options):
    """x_0 is twice the label's less the null's, so any other null class shows."""
    config = shown_config(options)
    model = show_condition(config, brightness)
    labels = np.arange(10)
    images = draw_all(
        config, model, generation.make_condition(labels, config), guidance=2.0, **options
    )
    null = 10
    expected = bytes_of(2 * brightness(labels) - brightness(np.array([null])))
    np.testing.assert_allclose(images, np.broadcast_to(expected, images.shape), atol=1)


@pytest.mark.parametrize("options", [DDIM, HEUN])
def test_the_samples_are_guided_away_from_the_null_mask(options):
    config = shown_config(options, data=dict(mask_classes=2))
    model = show_condition(config, brightness)
    labels = np.arange(10)
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2
    condition = generation.make_condition(labels, config, mask)
    images = draw_all(config, model, condition, guidance=2.0, **options)
    asked = brightness(labels, mask[None].astype(float))
    nothing = brightness(np.array([10]), np.full((1, 8, 8), 2.0))
    expected = bytes_of(2 * asked - nothing)
    np.testing.assert_allclose(images, expected, atol=1)


def test_without_guidance_each_sample_shows_its_own_condition():
    config = shown_config(data=dict(mask_classes=2))
    model = show_condition(config, brightness)
    labels = np.array([7, 2, 2, 9, 0])
    masks = np.random.default_rng(0).integers(0, 2, (5, 8, 8)).astype(np.uint8)
    condition = generation.make_condition(labels, config, masks)
    images = draw_all(config, model, condition, batch_size=2, **DDIM)
    np.testing.assert_allclose(images, bytes_of(brightness(labels, masks * 1.0)), atol=1)


def test_one_compilation_serves_all_conditions_seeds_and_guidance_and_one_no_guidance():
    config, traced = shown_config(), []
    shown = show_condition(config, brightness)

    def predict(*args, **options):
        traced.append(options)
        return shown(*args, **options)

    model = jax.tree_util.Partial(predict)
    draw_all(config, model, generation.make_condition([7, 2, 9], config), guidance=2.0, **DDIM)
    assert traced
    traced.clear()
    labels, null = np.array([1, 8, 3]), brightness(np.array([10]))
    condition = generation.make_condition(labels, config)
    for guidance in (0.0, 1.5, 3.0):
        images = draw_all(config, model, condition, guidance=guidance, seed=5, **DDIM)
        expected = bytes_of(null + guidance * (brightness(labels) - null))
        np.testing.assert_allclose(images, np.broadcast_to(expected, images.shape), atol=1)
    assert not traced
    draw_all(config, model, condition, guidance=1.0, **DDIM)
    assert traced


@pytest.mark.slow
def test_guidance_sends_nothing_between_devices_at_any_step():
    config, mesh = tiny_config(), local_mesh()
    sample = generation.make_sampler(config, mesh, "ddim", 3, 0.0, None, (20.0, 60.0), 1.0)
    condition = generation.make_condition(np.arange(16) % 10, config)
    inputs = place_rows((condition, np.arange(16)), 16, mesh)
    with jax.set_mesh(mesh):
        lowered = sample.lower(awake_model(), None, *inputs, np.uint32(0), 2.0, None, None)
    sent = collectives(lowered.compile().as_text())
    assert [each.shapes for each in sent] == [("u8[16,8,8,1]",)], "the images, when they are made"


@pytest.mark.parametrize("options", [DDIM, HEUN])
def test_cfg_channels_guide_the_first_channels_alone(options):
    config = shown_config(options, data=dict(channels=3))
    model = show_condition(config, brightness)
    labels = np.arange(10)
    condition = generation.make_condition(labels, config)
    images = draw_all(config, model, condition, guidance=2.0, cfg_channels=1, **options)
    guided = bytes_of(2 * brightness(labels) - brightness(np.array([10])))
    plain = bytes_of(brightness(labels))
    assert (np.abs(guided - plain) > 10).any()
    np.testing.assert_allclose(images[..., :1], np.broadcast_to(guided, (10, 8, 8, 1)), atol=1)
    np.testing.assert_allclose(images[..., 1:], np.broadcast_to(plain, (10, 8, 8, 2)), atol=1)


@pytest.mark.parametrize(
    "options, middle, end", [(DDIM, 50.0, 100.0), (EULER, 0.5, 1.5), (HEUN, 0.5, 1.5)]
)
def test_the_interval_is_of_the_objectives_own_times(options, middle, end):
    """The last of three steps, which makes the image, is at timestep 0, or from 1/3 of flow."""
    config = shown_config(options)
    model = show_condition(config, brightness)
    condition = generation.make_condition(np.arange(10), config)
    guided = options | dict(guidance=2.0)
    always = draw_all(config, model, condition, **guided)
    last = draw_all(config, model, condition, guidance_interval=(0.0, middle), **guided)
    never = draw_all(config, model, condition, guidance_interval=(middle, end), **guided)
    plain = draw_all(config, model, condition, **options)
    assert (np.abs(always - plain) > 10).any()
    np.testing.assert_allclose(last, always, atol=1)
    np.testing.assert_allclose(never, plain, atol=1)


# Sample i is a function of (seed, i)


@pytest.mark.parametrize("options", [DDPM, DDIM | dict(eta=0.5, guidance=2.0), HEUN])
def test_the_batch_does_not_change_a_sample_and_the_seed_does(options):
    config, condition = config_for(options), some_digits()
    model = awake_model(config)
    whole = draw_all(config, model, condition, **options)
    assert whole.shape == (11, 8, 8, 1)
    assert whole.std() > 10
    for batch_size in (1, 7):  # on 8 devices: batches of 8
        parts = draw_all(config, model, condition, batch_size, **options)
        assert np.abs(whole - parts).max() <= 1
    other = draw_all(config, model, condition, seed=1, **options)
    assert (whole != other).mean() > 0.5


def test_a_model_and_its_guide_from_one_device_are_placed_on_all():
    """And a model that guides itself draws as it does without."""
    config, labels = tiny_config(), np.arange(11) % 10
    model = jax.device_put(awake_model(), jax.devices()[0])
    plain = generation.generate(model, config, labels)
    guided = generation.generate(model, config, labels, guidance=30.0, guide=model)
    assert np.abs(guided.astype(int) - plain).max() <= 1
    assert (generation.generate(model, config, labels, guidance=30.0) != plain).any()


def test_a_batch_begins_where_it_is_told_and_ends_with_the_condition():
    config, condition = tiny_config(), some_digits()
    whole = draw_all(config, awake_model(), condition, **DDIM)
    draw = generation.make_draw(config, local_mesh(), condition, 4, **DDIM)
    for first, count in [(0, 4), (4, 4), (8, 3), (5, 4), (10, 1)]:
        images = draw(awake_model(), None, first)
        assert images.dtype == np.uint8
        assert len(images) == count
        assert np.abs(images.astype(int) - whole[first : first + count]).max() <= 1


def test_two_samples_of_one_class_differ():
    condition = generation.make_condition([3, 3], tiny_config())
    for options in (DDIM, DDPM):
        first, second = draw_all(tiny_config(), awake_model(), condition, **options)
        assert (first != second).mean() > 0.3


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_images_are_the_same_for_any_number_of_devices(count):
    config, condition = tiny_config(), some_digits()
    whole = draw_all(config, awake_model(), condition, guidance=2.0, **DDIM)
    mesh = make_mesh(config, jax.devices()[:count])
    model = jax.device_put(awake_model(), replicated(mesh))
    images = draw_all(config, model, condition, mesh=mesh, guidance=2.0, **DDIM)
    assert np.abs(images - whole).max() <= 1


def test_every_option_reaches_the_sampler():
    config, condition = tiny_config(), some_digits()
    base = draw_all(config, awake_model(), condition, **DDIM)
    changes = [
        dict(sampler="ddpm"),
        dict(steps=5),
        dict(eta=1.0),
        dict(guidance=3.0),
        dict(seed=7),
        dict(style=jnp.full((1, 4, 4, 1), 0.5)),
    ]
    for changed in changes:
        images = draw_all(config, awake_model(), condition, **(DDIM | changed))
        assert (images != base).any(), changed


# Style, pixels and latents


@pytest.mark.parametrize("options", [DDIM, HEUN])
def test_style_gives_the_samples_the_pictures_statistics_as_far_as_asked(options):
    config, condition = config_for(options), some_digits()
    model = awake_model(config)
    picture = np.clip(np.random.default_rng(0).normal(170, 30, (16, 16)), 0, 255)
    style = from_uint8(jnp.asarray(picture.astype(np.uint8)))[None, ..., None]
    draw = functools.partial(draw_all, config, model, condition, style=style, **options)
    plain = draw_all(config, model, condition, **options)
    np.testing.assert_array_equal(draw(style_strength=0.0), plain)

    def distance(images):
        means = images.mean(axis=(1, 2)) - picture.mean()
        deviations = images.std(axis=(1, 2)) - picture.std()
        return np.abs([means, deviations]).mean()

    styled = distance(draw(style_strength=1.0))
    half = distance(draw(style_strength=0.5))
    assert styled < distance(plain) / 10
    assert styled < half < distance(plain)


@jax.tree_util.register_static
class PlainVAE:
    """In place of a VAE: the first channels of a latent are its image, each pixel 8 times."""

    def __init__(self):
        self.rows = []  # of each call, when it was traced

    def decode(self, z):
        self.rows.append(len(z))
        return z[..., :3].repeat(8, axis=1).repeat(8, axis=2)


LATENTS = dict(latents="x", image_size=64, latent_scale=1.0)


@pytest.mark.parametrize(
    "data, vae, held", [(dict(), None, 1.0), (LATENTS, PlainVAE(), 10.0)], ids=["pixels", "latents"]
)
def test_predictions_are_held_in_the_range_of_pixels_but_not_for_latents(data, vae, held):
    """The model predicts 10 and then, at the last step, a fortieth of what it sees."""
    config = shown_config(data=data)
    process = make_objective(config)

    def predict(x, t, y):
        is_last = t.reshape(-1, 1, 1, 1) == 0
        return process.pred_eps(jnp.where(is_last, x / 40, 10.0), x, t)

    condition = generation.make_condition([1, 2], config)
    images = draw_all(config, jax.tree_util.Partial(predict), condition, vae=vae, **DDIM)
    np.testing.assert_allclose(images, bytes_of(held / 40), atol=4)


def test_latents_are_scaled_back_before_they_are_decoded():
    config = shown_config(data=dict(latents="x", image_size=32, latent_scale=5.0))
    model = show_condition(config, lambda y: 2.5 * brightness(y))
    condition = generation.make_condition(np.arange(10), config)
    images = draw_all(config, model, condition, vae=PlainVAE(), **DDIM)
    assert images.shape == (10, 32, 32, 3)
    expected = bytes_of(2.5 * brightness(np.arange(10)) / 5.0)
    np.testing.assert_allclose(images, np.broadcast_to(expected, images.shape), atol=1)


@pytest.mark.parametrize("devices, at_once, rows", [(1, 1, 1), (1, 2, 2), (2, 1, 2), (1, 9, 4)])
def test_latents_are_decoded_a_few_at_a_time_in_their_order(monkeypatch, devices, at_once, rows):
    config = tiny_config(data=dict(latents="x", image_size=16))
    monkeypatch.setattr(generation, "VAE_PIXELS", at_once * 16**2)
    latents = config.data.latent_scale * jax.random.uniform(jax.random.key(0), (4, 2, 2, 4))
    vae = PlainVAE()
    images = generation.decode(vae, latents, config, devices)
    assert set(vae.rows) == {rows}, "on each device, at most so many at once"
    whole = to_uint8(PlainVAE().decode(latents / config.data.latent_scale))
    assert np.abs(np.asarray(images, int) - np.asarray(whole, int)).max() <= 1


# Grids


def grid_data(num_classes: int) -> tuple[Config, Dataset]:
    names = tuple(f"class {k}, a synonym" for k in range(num_classes))
    config = shown_config(data=dict(num_classes=num_classes), train=dict(guidance=1.0))
    images = np.zeros((num_classes, 8, 8, 1), np.uint8)
    return config, Dataset(InMemory(images, np.arange(num_classes, dtype=np.int32)), names)


@pytest.mark.parametrize("num_classes", [3, 10, 13])
def test_each_row_of_a_grid_is_of_the_class_that_stands_before_it(num_classes):
    config, dataset = grid_data(num_classes)
    model = show_condition(config, brightness)
    draw = generation.make_grid_sampler(config, None, dataset, local_mesh())
    images, names = draw(model)
    classes = generation.spread_classes(num_classes)
    assert names == [f"class {k}" for k in classes]
    rows = images.reshape(len(names), -1, 8, 8, 1)
    assert rows.shape[1] == generation.GRID_COLUMNS
    for row, name in zip(rows, names, strict=True):
        label = int(name.removeprefix("class "))
        expected = int(bytes_of(brightness(np.array([label])))[0, 0, 0, 0])
        np.testing.assert_allclose(row.astype(int), expected, atol=1)


def test_a_grid_is_guided_as_train_guidance_says():
    config, dataset = grid_data(3)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, guidance=2.0))
    images, _ = generation.make_grid_sampler(config, None, dataset, local_mesh())(
        show_condition(config, brightness)
    )
    shades = images.reshape(3, -1)[:, 0].astype(int)
    labels, null = np.arange(3), np.array([3])
    expected = bytes_of(2 * brightness(labels) - brightness(null)).ravel()
    np.testing.assert_allclose(shades, expected, atol=1)


def test_a_grid_of_a_model_with_masks_shows_masks_of_each_rows_class():
    config = shown_config(data=dict(mask_classes=2), train=dict(guidance=1.0))
    digits = open_dataset(config.data)
    images, names = generation.make_grid_sampler(config, None, digits, local_mesh())(
        show_condition(config, brightness)
    )
    examples = digits.records.read(range(1000))
    rows = images.reshape(10, -1, 8, 8, 1).astype(int)
    varied = [len(np.unique(row, axis=0)) > 1 for row in rows]
    assert sum(varied) > 5, "not one mask for all"
    for name, row in zip(names, rows, strict=True):
        label = int(name)
        masks = examples["mask"][examples["label"] == label]
        expected = bytes_of(brightness(np.full(len(masks), label), masks * 1.0))
        for image in row:
            assert (np.abs(image - expected).max(axis=(1, 2, 3)) <= 1).any()


def test_a_grid_has_the_same_noise_each_time_and_another_for_another_seed():
    config = tiny_config()
    digits = open_dataset(config.data)
    draw = generation.make_grid_sampler(config, None, digits, local_mesh())
    first, names = draw(awake_model())
    again, _ = draw(awake_model())
    np.testing.assert_array_equal(first, again)
    assert names == list("0123456789")
    other_config = tiny_config(train=dict(seed=5))
    other, _ = generation.make_grid_sampler(other_config, None, digits, local_mesh())(awake_model())
    assert (first != other).mean() > 0.3


def test_a_grid_is_broken_off_between_two_batches():
    config, dataset = grid_data(3)
    checks = iter([None, Stopped("now")])

    def check_stop():
        if stopped := next(checks):
            raise stopped

    draw = generation.make_grid_sampler(config, None, dataset, local_mesh(), check_stop)
    with pytest.raises(Stopped, match="now"):
        draw(show_condition(config, brightness))


# Many samples, in files of one batch


def test_many_samples_go_on_where_they_were_killed(tmp_path):
    config = shown_config()
    model = show_condition(config, brightness)
    labels = generation.draw_labels("random", 0, np.arange(10), 21)
    draw = generation.make_draw(
        config, local_mesh(), generation.make_condition(labels, config), 8, **DDIM
    )
    drawn = []

    def dies_at_the_second(model, vae, first):
        if len(drawn) == 1:
            drawn.append("killed")
            raise KeyboardInterrupt
        drawn.append(first)
        return draw(model, vae, first)

    out, parts = tmp_path / "x.npz", tmp_path / "parts"
    claim_folder(parts, {}, "--out")
    arguments = (model, None, labels, 8, out, parts)
    with pytest.raises(KeyboardInterrupt):
        generation.draw_npz(dies_at_the_second, *arguments)
    assert not out.exists()
    generation.draw_npz(dies_at_the_second, *arguments)
    assert drawn == [0, "killed", 8, 16], "what was drawn is not drawn again"
    arrays = np.load(out)
    assert arrays.keys() == {"arr_0", "arr_1"}
    np.testing.assert_array_equal(arrays["arr_1"], labels)
    assert arrays["arr_1"].dtype == np.int64
    expected = np.broadcast_to(bytes_of(brightness(labels)), (21, 8, 8, 1))
    np.testing.assert_allclose(arrays["arr_0"].astype(int), expected, atol=1)


def test_parts_that_are_damaged_or_of_another_batch_are_drawn_again(tmp_path, monkeypatch):
    drawn = []

    def draw(model, vae, first):
        drawn.append(first)
        return np.full((min(2, 9 - first), 4, 4, 1), first, np.uint8)

    def keep_parts(out, paths, labels):
        raise KeyboardInterrupt

    out, parts = tmp_path / "x.npz", tmp_path / "parts"
    parts.mkdir()
    arguments = (draw, None, None, np.arange(9), 2, out, parts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generation, "write_npz", keep_parts)
        generation.draw_npz(*arguments)
    paths = sorted(parts.iterdir())
    content = bytearray(paths[0].read_bytes())
    content[len(content) // 2] ^= 1
    paths[0].write_bytes(content)
    np.save(paths[1], np.zeros((2, 4, 5, 1), np.uint8))
    np.save(paths[2], np.zeros((2, 4, 4, 1)))
    paths[3].write_bytes(paths[4].read_bytes())
    drawn.clear()
    generation.draw_npz(*arguments)
    assert drawn == [0, 2, 4, 6]
    shades = np.load(out)["arr_0"][:, 0, 0, 0]
    np.testing.assert_array_equal(shades, [0, 0, 2, 2, 4, 4, 6, 6, 8])


def test_each_host_draws_its_share_of_the_files_and_the_first_joins_them(tmp_path, monkeypatch):
    drawn = []

    def draw(model, vae, first):
        drawn.append(first)
        return np.full((2, 4, 4, 1), first, np.uint8)

    labels = np.arange(10, dtype=np.int32)
    out, parts = tmp_path / "x.npz", tmp_path / "parts"
    parts.mkdir()
    monkeypatch.setattr(generation.multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    generation.draw_npz(draw, None, None, labels, 2, out, parts)
    assert drawn == [2, 6]
    assert not out.exists()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    generation.draw_npz(draw, None, None, labels, 2, out, parts)
    assert drawn == [2, 6, 0, 4, 8]
    shades = np.load(out)["arr_0"][:, 0, 0, 0]
    np.testing.assert_array_equal(shades, [0, 0, 2, 2, 4, 4, 6, 6, 8, 8])
