import dataclasses
import importlib.util
import json
import math
import types
import typing
from pathlib import Path

import pytest
from conftest import tiny_config

from dit import config as dit_config
from dit.cli import load_preset, preset_names
from dit.config import Config, Data, Eval, InputError, Mesh, Model, check_fields, replace


def is_optional(hint) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def fields() -> dict[str, typing.Any]:
    """{"section.field": annotation} of the whole config."""
    hints = {}
    for section in dataclasses.fields(Config):
        if section.name != "name":
            kind = section.default_factory
            for name, hint in typing.get_type_hints(kind, include_extras=True).items():
                hints[f"{section.name}.{name}"] = hint
    return hints


def check(name: str, value) -> None:
    """Holds one field, such as "train.steps", against its annotation."""
    section, field = name.split(".")
    check_fields(replace(Config(), **{section: {field: value}}))


# Presets and JSON


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_survives_json(name):
    preset = load_preset(name).validate()
    assert preset.name == name
    assert dit_config.from_json(json.loads(preset.to_json())) == preset


def test_json_of_before_a_field_was_added_gives_its_default():
    values = {"name": "x", "model": {"depth": 3}}
    assert dit_config.from_json(values) == Config(name="x", model=Model(depth=3))
    assert dit_config.from_json({}) == Config()


def test_several_decays_survive_json_and_stay_hashable():
    several = tiny_config(optim=dict(ema_decay=[0.99, 0.5])).validate()  # a file may hold a list
    assert dit_config.from_json(json.loads(several.to_json())) == several
    assert hash(several) == hash(tiny_config(optim=dict(ema_decay=(0.99, 0.5))))
    assert several.optim.averages == {"ema": 0.99, "ema_0.5": 0.5}
    assert tiny_config().optim.averages == {"ema": 0.99}


@pytest.mark.parametrize(
    "decays, words",
    [
        ((), "() should be one or more"),
        ((0.9, 1.0), "1.0 should be from 0 to below 1"),
        ((0.9, "x"), "'x' should be of type float"),
        ((0.9, None), "None should be of type float"),
        (None, "None should be of type float"),
        ((0.9, 0.99, 0.9), "(0.9, 0.99, 0.9) should be decays that differ"),
    ],
)
def test_decays_that_cannot_be_are_refused(decays, words):
    with pytest.raises(InputError) as refusal:
        tiny_config(optim=dict(ema_decay=decays)).validate()
    assert str(refusal.value) == f"optim.ema_decay: {words}"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"size": 3}, "size: 3 should be left out: this version has no such field"),
        ({"model": {"width": 3}}, "model.width: 3 should be left out: this version has no such"),
        ({"model": {"input_shape": 3}}, "model.input_shape: 3 should be left out"),
        ({"model": 3}, "model: 3 should be an object of fields"),
        ({"train": []}, "train: [] should be an object of fields"),
        ({"name": None}, "name: None should be of type str"),
        ({"train": {"steps": "ten"}}, "train.steps: 'ten' should be of type int"),
        ({"model": {"num_heads": 5}}, "model.hidden_size: 384 should be a multiple of num_heads"),
    ],
)
def test_json_that_is_no_config_of_this_version_is_refused_by_the_field(values, words):
    with pytest.raises(InputError) as refusal:
        dit_config.from_json(values)
    assert str(refusal.value).startswith(words)


def test_json_of_a_run_with_wandb_is_read_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dit_config.from_json({"train": {"wandb": True}}).train.wandb


def test_replace_changes_the_fields_named_and_no_other():
    config = tiny_config()
    changed = replace(config, train=dict(steps=77), model=dict(depth=5))
    assert (changed.train.steps, changed.model.depth) == (77, 5)
    assert replace(changed, train=dict(steps=4), model=dict(depth=2)) == config


def test_the_network_sees_pixels_or_latents_of_an_eighth_of_the_side():
    pixels = Data(image_size=64, channels=3)
    assert Config(data=pixels).input_shape == (64, 64, 3)
    assert Config(data=dataclasses.replace(pixels, latents="x")).input_shape == (8, 8, 4)


def test_a_run_is_kept_under_its_name_unless_told_otherwise():
    assert Config(name="mine").workdir == Path("runs/mine")
    assert replace(Config(name="mine"), train=dict(workdir="there")).workdir == Path("there")


# Each field on its own


RANGES = {  # annotation: values outside, values inside, how the range is named
    dit_config.PositiveInt: ([0, -1], [1], "more than 0"),
    dit_config.NonNegativeInt: ([-1], [0], "0 or more"),
    dit_config.PositiveFloat: ([0.0, -0.5, math.nan], [1e-9], "more than 0"),
    dit_config.NonNegativeFloat: ([-1e-9, math.nan], [0.0], "0 or more"),
    dit_config.AnyPath: (["", "a\0b"], ["a", "a/b"], "a path"),
    dit_config.Probability: ([-0.1, 1.1, math.nan], [0.0, 1.0], "a probability, from 0 to 1"),
    dit_config.Decay: ([-0.1, 1.0, math.nan], [0.0, 0.9999], "from 0 to below 1"),
    dit_config.Seed: ([-1, 2**32], [0, 2**32 - 1], "from 0 to 2^32 - 1"),
    dit_config.Byte: ([-1, 256], [0, 255], "from 0 to 255"),
    dit_config.AtLeastTwo: ([1], [2], "more than 1"),
    dit_config.Side: ([0, 4097], [1, 4096], "from 1 to 4096"),
    dit_config.DenoisingSteps: ([0, 1_000_001], [1, 1_000_000], "from 1 to 1000000"),
    dit_config.Timesteps: ([1, 1_000_001], [2, 1_000_000], "from 2 to 1000000"),
}


def alias_of(hint):
    """The annotation that names a range, without its `| None`."""
    return typing.get_args(hint)[0] if is_optional(hint) else hint


def base_type(hint):
    """`int`, for `PositiveInt | None`."""
    hint = alias_of(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def is_number(hint) -> bool:
    return base_type(hint) in (int, float)


def test_every_annotation_with_a_range_is_used_and_in_the_table():
    with_range = {
        alias_of(hint)
        for hint in fields().values()
        for part in typing.get_args(alias_of(hint))
        if isinstance(part, dit_config.Range)
    }
    assert with_range == set(RANGES)


def test_every_number_has_a_range_but_those_that_may_be_anything():
    free = {name for name, hint in fields().items() if alias_of(hint) in (int, float)}
    assert free == {"mesh.data", "objective.time_mean", "train.guidance", "eval.guidance"}


RANGED = [name for name, hint in fields().items() if alias_of(hint) in RANGES]


@pytest.mark.parametrize("name", RANGED)
def test_a_field_keeps_to_its_range_and_names_it(name):
    outside, inside, words = RANGES[alias_of(fields()[name])]
    for value in inside:
        check(name, value)
    for value in outside:
        with pytest.raises(InputError) as refusal:
            check(name, value)
        is_finite = isinstance(value, str) or math.isfinite(value)
        expected = words if is_finite else "a finite number"
        assert str(refusal.value) == f"{name}: {value!r} should be {expected}"


NUMBERS = [name for name, hint in fields().items() if is_number(hint)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_finite_as_float32_has_it(name):
    is_float = base_type(fields()[name]) is float
    for value in [10**400, *([math.nan, math.inf, -math.inf, 1e39] if is_float else [])]:
        with pytest.raises(InputError) as refusal:
            check(name, value)
        assert str(refusal.value) == f"{name}: {value!r} should be a finite number"


def test_scores_are_made_as_the_published_ones_unless_told_otherwise():
    flow = dict(name="flow")
    assert Config().protocol == ("ddpm", 250)
    assert replace(Config(), objective=flow).protocol == ("heun", 125)
    assert replace(Config(), objective=dict(num_steps=101)).protocol == ("ddpm", 101)
    assert replace(Config(), eval=dict(sampler="ddim", steps=50)).protocol == ("ddim", 50)
    for evaluation, words in [
        (dict(sampler="heun"), "eval.sampler"),
        (dict(steps=1001), "eval.steps"),
    ]:
        with pytest.raises(InputError, match=f"^{words}: "):
            replace(Config(), eval=evaluation).validate()


@pytest.mark.parametrize("name, hint", fields().items())
def test_a_field_takes_no_value_of_another_type(name, hint):
    wrong = [object()]
    if hint is not bool:
        wrong += [True, False]
    if not is_optional(hint) and name != "train.workdir":  # whose alias holds the `| None`
        wrong.append(None)
    for value in wrong:
        with pytest.raises(InputError) as refusal:
            check(name, value)
        assert str(refusal.value).startswith(f"{name}: {value!r} should be ")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("train.steps", "ten", "of type int"),
        ("train.steps", 3.0, "of type int"),
        ("train.steps", True, "of type int"),
        ("train.steps", None, "of type int"),
        ("optim.learning_rate", "1e-4", "of type float"),
        ("optim.grad_clip", "1", "of type float"),
        ("mesh.distributed", 1, "of type bool"),
        ("mesh.distributed", "yes", "of type bool"),
        ("model.remat", True, "one of none, dots, full"),
        ("mesh.data", "all", "of type int"),
        ("data.name", 10, "of type str"),
        ("data.latents", Path("latents"), "of type str"),
        ("train.workdir", 7, "of type str"),
        ("data.channels", 2, "one of 1, 3"),
        ("data.channels", "3", "one of 1, 3"),
        ("data.channels", 3.0, "one of 1, 3"),
        ("model.conditioning", 4, "of type str"),
        ("train.dtype", "float16", "one of float32, bfloat16"),
    ],
)
def test_a_config_file_can_hold_anything_and_is_refused_by_field_and_type(name, value, words):
    with pytest.raises(InputError) as refusal:
        check(name, value)
    assert str(refusal.value) == f"{name}: {value!r} should be {words}"


def test_a_section_and_the_name_are_held_to_their_types():
    with pytest.raises(InputError, match=r"^model: Eval\(.* should be a Model\(...\)$"):
        check_fields(Config(model=Eval()))
    with pytest.raises(InputError, match="^mesh: None should be a Mesh"):
        check_fields(Config(mesh=None))
    with pytest.raises(InputError, match="^name: 3 should be of type str$"):
        check_fields(Config(name=3))


def test_integers_serve_as_floats_and_none_where_it_may_stand():
    optim = dict(learning_rate=1, grad_clip=None)
    config = tiny_config(optim=optim, model=dict(mlp_ratio=2), train=dict(workdir=None))
    assert config.validate() is config


# Relations between fields


FLOW = dict(name="flow", num_steps=1000, schedule="linear")
MASKS = dict(mask_classes=2)
LATENTS = dict(latents="x", image_size=48)


@pytest.mark.parametrize(
    "sections, words",
    [
        (
            dict(data=dict(image_size=9)),
            "data.image_size: 9 should be a multiple of model.patch_size = 2",
        ),
        (
            dict(data=dict(latents="x", image_size=100)),
            "data.image_size: 100 should be a multiple of model.patch_size = 2 times the VAE's 8",
        ),
        (
            dict(data=dict(latents="x", image_size=248)),
            "data.image_size: 248 should be a multiple of model.patch_size = 2 times the VAE's 8",
        ),
        (
            dict(model=dict(num_heads=3)),
            "model.hidden_size: 20 should be a multiple of num_heads = 3",
        ),
        (
            dict(model=dict(hidden_size=18, num_heads=3)),
            "model.hidden_size: 18 should be a multiple of 4",
        ),
        (dict(model=dict(depth=0)), "model.depth: 0 should be more than 0"),
        (dict(model=dict(mlp_ratio=0.01)), "model.mlp_ratio: 0.01 should be large enough"),
        (
            dict(train=dict(batch_size=10), optim=dict(accumulate=4)),
            "train.batch_size: 10 should be a multiple of optim.accumulate = 4",
        ),
        (
            dict(train=dict(sample_steps=102)),
            "train.sample_steps: 102 should be from 1 to the model's 101 timesteps",
        ),
        (
            dict(eval=dict(steps=102)),
            "eval.steps: 102 should be from 1 to the model's 101 timesteps",
        ),
        (
            dict(objective=dict(schedule="linear", num_steps=20), train=dict(sample_steps=3)),
            "objective.num_steps: 20 should be more than 20",
        ),
        (
            dict(objective=dict(name="flow", num_steps=101)),
            "objective.num_steps: 101 should be left at 1000: it is ddpm's, and objective.name is",
        ),
        (
            dict(objective=FLOW | dict(min_snr_gamma=5.0)),
            "objective.min_snr_gamma: 5.0 should be left at None: it is ddpm's, and objective.name",
        ),
        (
            dict(objective=dict(prediction="x0")),
            "objective.prediction: 'x0' should be left at 'v': it is flow's, and objective.name is",
        ),
        (
            dict(objective=FLOW, train=dict(sampler="ddim")),
            "train.sampler: 'ddim' should be heun or euler: objective.name is flow",
        ),
        (
            dict(train=dict(sampler="euler")),
            "train.sampler: 'euler' should be ddim or ddpm: objective.name is ddpm",
        ),
        (
            dict(data=MASKS, objective=dict(mask_dropout=0.05)),
            "objective.mask_dropout: 0.05 should be at least objective.label_dropout = 0.1",
        ),
        (
            dict(data=MASKS | LATENTS),
            "data.mask_classes: 2 should be 0 with data.latents",
        ),
        (dict(data=dict(vae="x")), "data.vae: 'x' should be given with data.latents"),
        (
            dict(eval=dict(split="train[90%:]")),
            "eval.split: 'train[90%:]' should be of other images than data.split = 'train', as",
        ),
        (
            dict(eval=dict(split="train"), data=dict(split="train[:9]")),
            "eval.split: 'train' should be of other images than data.split = 'train[:9]', as",
        ),
        (
            dict(eval=dict(split="train[:9]"), data=dict(split="train[:9]")),
            "eval.split: 'train[:9]' should be of other images than data.split = 'train[:9]', as",
        ),
        (
            dict(data=LATENTS | dict(augment=0.1)),
            "data.augment: 0.1 should be 0 with data.latents, which cannot be turned",
        ),
        (
            dict(eval=dict(every=3)),
            "eval.inception: None should be pytorch-fid's weights, with eval.every",
        ),
        (
            dict(eval=dict(every=3, inception="x"), data=LATENTS),
            "data.vae: None should be the folder of a VAE",
        ),
        (
            dict(eval=dict(every=3, inception="x"), data=LATENTS | dict(vae="x")),
            "eval.reference: None should be given",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name_value_and_remedy(sections, words):
    with pytest.raises(InputError) as refusal:
        tiny_config(**sections).validate()
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_refused_in_one_place_may_stand_in_another():
    evaluated = dict(every=3, inception="x", reference="x")
    for config in (
        tiny_config(data=MASKS, objective=dict(mask_dropout=0.1)),
        tiny_config(objective=dict(schedule="cosine", num_steps=3)),
        tiny_config(objective=FLOW, train=dict(sampler="euler", sample_steps=2000)),
        tiny_config(eval=evaluated, data=LATENTS | dict(vae="x")),
        tiny_config(eval=dict(split="train[90%:]"), data=dict(split="train[:90%]")),
        replace(tiny_config(), mesh=dataclasses.asdict(Mesh(data=2, fsdp=4))),
    ):
        assert config.validate() is config


def test_every_field_of_the_objective_belongs_to_one_or_to_both():
    both = ["name", "label_dropout", "mask_dropout"]
    owned = [name for names in dit_config.OWN_FIELDS.values() for name in names]
    names = [field.name for field in dataclasses.fields(dit_config.Objective)]
    assert sorted(owned + both) == sorted(names)


def test_the_sampler_of_a_run_is_its_objectives_unless_told_otherwise():
    assert tiny_config().sampler == "ddim"
    assert tiny_config(objective=FLOW).sampler == "heun"
    assert tiny_config(objective=FLOW, train=dict(sampler="euler")).sampler == "euler"


def test_only_ddpm_learns_a_variance():
    assert tiny_config().objective.learns_variance
    assert not tiny_config(objective=dict(variance="fixed_small")).objective.learns_variance
    assert not tiny_config(objective=FLOW).objective.learns_variance


def test_presets_by_flow_matching_see_more_noise_on_cifar10_and_any_on_latents_takes_one_flag():
    expected = {"digits_flow": (0, 1), "cifar10_tiny": (0.8, 0.8), "cifar10_flow": (0.8, 0.8)}
    for name, times in expected.items():
        objective = load_preset(name).objective
        assert (objective.time_mean, objective.time_std) == times
    on_latents = replace(load_preset("imagenet256_xl2"), objective=dict(name="flow")).validate()
    assert on_latents.objective.times == "logit_normal"
    assert (on_latents.objective.time_mean, on_latents.objective.time_std) == (0.0, 1.0)


def test_wandb_is_asked_for_before_anything_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="train.wandb: True should be False, or wandb be"):
        tiny_config(train=dict(wandb=True)).validate()
