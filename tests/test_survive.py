"""What a run survives, in short (benchmarks/survive.py has it all), and configs of all kinds."""

import re
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import base_type, fields, is_optional

from dit.config import Config, InputError
from dit.data import open_dataset, with_num_classes
from dit.model import check_block
from dit.sharding import make_mesh
from dit.state import abstract_state
from train import lower_train_step

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--only kills inputs --kills 1 --inputs 1".split()


def test_a_run_survives_what_can_happen_to_it():
    command = [sys.executable, "benchmarks/survive.py", *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Configs of all kinds

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-300, 300),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just(object),
)


def values(hint: typing.Any) -> st.SearchStrategy:
    """Small values of an annotation's type, in its range and out of it."""
    kind = base_type(hint)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    numbers = {int: st.integers(-1, 8), float: st.floats(-1, 2), bool: st.booleans()}
    strategy = numbers.get(kind, st.sampled_from(["x", "train", "digits"]))
    return st.none() | strategy if is_optional(hint) else strategy


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A small config with up to three fields changed."""
    changes = {}
    for name in draw(st.lists(st.sampled_from(sorted(fields())), max_size=3, unique=True)):
        section, field = name.split(".")
        value = draw(values(fields()[name]) | ANYTHING)
        changes.setdefault(section, {})[field] = value
    changes["model"] = dict(num_heads=1) | changes.get("model", {})
    return tiny_config(**changes)


@pytest.mark.slow
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(configs())
def test_a_config_is_refused_in_one_line_or_makes_a_step(config):
    try:
        config.validate()
        mesh = make_mesh(config)
        check_block(config.model.conditioning, config.data.mask_classes)
        config = with_num_classes(config, open_dataset(config.data))
    except InputError as refusal:
        assert re.fullmatch("[a-z_0-9. ]+: .* should .+", str(refusal))
        return
    state, metrics = lower_train_step(config, mesh).out_info
    assert shapes(state) == shapes(abstract_state(config, mesh))
    assert (metrics["loss"].shape, metrics["loss"].dtype) == ((), "float32")


def shapes(tree: typing.Any) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
