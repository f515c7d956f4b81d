import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config

import train
from dit import config
from dit.config import Config, InputError, Mesh, Model, Optim, Train, differences

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_is_valid_and_survives_json(name):
    preset = config.load(name).validate()
    assert preset.name == name and config.from_json(preset.to_json()) == preset


@pytest.mark.parametrize("sections, words", [
    (dict(data=dict(image_size=9)), "data.image_size: 9 should be a multiple of model.patch_size = 2"),
    (dict(model=dict(num_heads=3)), "model.hidden_size: 20 should be a multiple of model.num_heads = 3"),
    (dict(model=dict(hidden_size=18, num_heads=3)), "model.hidden_size: 18 should be a multiple of 4"),
    (dict(model=dict(depth=0)), "model.depth: 0 should be more than 0"),
    (dict(model=dict(conditioning="film")), "model.conditioning: 'film' should be one of adaln_zero, adaln"),
    (dict(train=dict(batch_size=10), optim=dict(accumulate=4)), "train.batch_size: 10 should be a multiple of optim.accumulate = 4"),
    (dict(train=dict(sample_steps=102)), "train.sample_steps: 102 should be at most objective.num_steps = 101"),
    (dict(train=dict(steps="ten")), "train.steps: 'ten' should be of type int"),
    (dict(train=dict(steps=True)), "train.steps: True should be of type int"),
    (dict(optim=dict(grad_clip=0.0)), "optim.grad_clip: 0.0 should be more than 0, or None"),
    (dict(optim=dict(ema_decay=1.0)), "optim.ema_decay: 1.0 should be from 0 to below 1"),
    (dict(objective=dict(label_dropout=1.5)), "objective.label_dropout: 1.5 should be a probability"),
    (dict(objective=dict(schedule="linear", num_steps=20), train=dict(sample_steps=3)), "objective.num_steps: 20 should be more than 20"),
    (dict(train=dict(seed=-1)), "train.seed: -1 should be from 0 to 2^32 - 1"),
    (dict(model=dict(mlp_ratio=0.01)), "model.mlp_ratio: 0.01 should be large enough"),
    (dict(data=dict(channels=2)), "data.channels: 2 should be 1 or 3"),
    (dict(data=dict(mask_classes=256)), "data.mask_classes: 256 should be from 0 to 255"),
    (dict(data=dict(mask_classes=2), model=dict(conditioning="in_context")), "data.mask_classes: 2 should be 0 with model.conditioning"),
    (dict(data=dict(mask_classes=2), objective=dict(mask_dropout=0.05)), "objective.mask_dropout: 0.05 should be at least objective.label"),
    (dict(data=dict(mask_classes=2, latents="x", image_size=48)), "data.mask_classes: 2 should be 0 with data.latents"),
    (dict(data=dict(vae="x")), "data.vae: 'x' should be given with data.latents"),
    (dict(eval=dict(every=3)), "eval.inception: None should be the weights file of pytorch-fid"),
    (dict(eval=dict(every=3, inception="x"), data=dict(latents="x", image_size=48)), "data.vae: None should be the folder of a VAE"),
    (dict(eval=dict(every=3, inception="x"), data=dict(latents="x", vae="x", image_size=48)), "eval.reference: None should be given"),
    (dict(data=dict(latents="x", image_size=100)), "data.image_size: 100 should be a multiple of 8, the VAE's factor"),
    (dict(data=dict(latents="x", image_size=248)), "data.image_size: 248 should be a multiple of model.patch_size = 2 times the VAE's 8"),
])
def test_a_config_that_cannot_be_is_refused_by_field_value_and_remedy(sections, words):
    with pytest.raises(InputError) as refusal:
        tiny_config(**sections).validate()
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_integers_serve_as_floats_and_none_where_it_may_stand():
    config_with = tiny_config(optim=dict(learning_rate=1, grad_clip=None), model=dict(mlp_ratio=2))
    assert config_with.validate() is config_with


@pytest.mark.parametrize("argv, words", [
    (["cifar100"], "preset: 'cifar100' is neither a preset nor a Python file; the nearest preset is 'cifar10'"),
    (["digits", "--model.hiden-size", "3"], "Unrecognized options: --model.hiden-size, 3 Perhaps you meant: --model.hidden-size"),
    (["digits", "--train.steps", "ten"], "Error parsing --train.steps: invalid literal for int() with base 10: 'ten'"),
    (["digits", "--train.dtype", "float16"], "invalid choice 'float16' for argument '--train.dtype'"),
    (["digits", "--train.steps"], "Missing value for argument '--train.steps'"),
    ([], "preset: missing; it should come first"),
    (["nowhere.py"], "preset: 'nowhere.py' is neither a preset nor a Python file"),
])
def test_a_command_line_that_cannot_be_is_refused_in_one_line(refused, argv, words):
    assert words in refused(train.main, *argv)


@pytest.mark.parametrize("text, words", [
    ("from dit.config import *\nconfig = Config(model=Model(hiden_size=3))", "unexpected keyword argument 'hiden_size'"),
    ("config = 3", "config: 3 should be a Config(...)"),
    ("config = (", "was never closed"),
    ("config = 1 / 0", "ZeroDivisionError: division by zero"),
    ("from dit.config import *\nconfig = Config(model=Train())", "model: Train("),
    ("from dit.config import *\nconfig = Config(train=Train(steps='3'))", "train.steps: '3' should be of type int"),
])
def test_a_config_file_that_cannot_be_is_refused_in_one_line(refused, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    assert words in refused(train.main, tmp_path / "mine.py")


def test_differences_name_field_and_both_values_and_let_go_what_does_not_matter():
    ours = Config(model=Model(depth=4, remat=True), train=Train(steps=5, seed=1), mesh=Mesh(fsdp=2), name="x")
    assert differences(ours, Config()) == ["model.depth: 4, where 12 is stored", "train.seed: 1, where 0 is stored"]
    assert differences(ours, ours) == []
    cosine, longer = Config(optim=Optim(schedule="cosine")), Config(optim=Optim(schedule="cosine"), train=Train(steps=7, dtype="float32"))
    assert differences(longer, cosine) == ["train.dtype: 'float32', where 'bfloat16' is stored", "train.steps: 7, where 400000 is stored"]


def test_wandb_is_asked_for_before_anything_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="train.wandb: True should be False, or wandb be installed"):
        tiny_config(train=dict(wandb=True)).validate()


def test_help_documents_every_field():
    out = subprocess.run([sys.executable, "train.py", "digits", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = " ".join(out.replace("│", " ").split())
    for section in dataclasses.fields(Config):
        if section.name != "name":
            for field in dataclasses.fields(section.default_factory):
                if field.name != "class_names":
                    flag = f"--{section.name}.{field.name}".replace("_", "-")
                    described = text.split(flag + " ", 1)[1] if flag + " " in text else text.split(flag + ",", 1)[1]
                    words = re.sub(r"^.*?([a-z`])", r"\1", described.split("(default:")[0].split("} ")[-1])
                    assert len(words.split()) >= 2, flag
