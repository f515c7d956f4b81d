"""What a compiled program sends, and what the training step sends on eight devices."""

import functools
import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import NamedSharding, PartitionSpec

import train
from dit import linear, model, sharding
from dit.config import Config
from dit.model import DiT, count_parameters
from dit.program import (
    Collective,
    array_bytes,
    collectives,
    computations,
    device_groups,
    result_shapes,
    trip_count,
    walk,
)
from dit.sharding import make_mesh
from dit.state import abstract_state
from dit.topology import devices_of

# What each kind costs


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("all-gather", 1000 * 3 / 4),
        ("reduce-scatter", 1000 * 3 / 4),
        ("all-to-all", 1000 * 3 / 4),
        ("all-reduce", 2 * 1000 * 3 / 4),
        ("collective-permute", 1000),
    ],
)
def test_the_bytes_are_those_of_the_formulas(kind, expected):
    groups = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert Collective(kind, ("f32[250]",), 1000, groups, times=1).bytes == expected
    assert Collective(kind, ("f32[250]",), 1000, groups, times=6).bytes == 6 * expected


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[3,5,7]", 4 * 105),
        ("bf16[3,5]", 30),
        ("f32[]", 4),
        ("pred[9]", 9),
        ("s32[0,4]", 0),
        ("f8e4m3fn[11]", 11),
    ],
)
def test_the_bytes_of_an_array(shape, size):
    assert array_bytes(shape) == size


# Programs whose content is known


def compiled(f, shape: tuple[int, ...], spec: PartitionSpec, devices=8, fsdp=1) -> str:
    """The optimised HLO of f on an array that lies on a mesh as `spec` says."""
    mesh = make_mesh(tiny_config(mesh=dict(fsdp=fsdp)), jax.devices()[:devices])
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(x).compile().as_text()


def five_sums(x: jax.Array) -> jax.Array:
    """Of the rows of x `[N, C]`, each after the other: `[C]`."""

    def add(total: jax.Array, _) -> tuple[jax.Array, None]:
        return jnp.tanh(x + total[None]).sum(axis=0), None

    return jax.lax.scan(add, jnp.zeros(x.shape[1]), length=5)[0]


def test_a_sum_over_the_devices_in_a_loop_is_an_all_reduce_a_trip():
    (found,) = collectives(compiled(five_sums, (16, 7), PartitionSpec("data")))
    assert (found.kind, found.shapes, found.times) == ("all-reduce", ("f32[7]",), 5)
    assert found.groups.tolist() == [list(range(8))]
    assert found.bytes == 5 * 2 * 7 * 4 * 7 / 8


def test_the_trips_of_a_loop_in_a_loop_are_multiplied():
    def three_times(x: jax.Array) -> jax.Array:
        def add(total: jax.Array, _) -> tuple[jax.Array, None]:
            return total + five_sums(x + total[None]), None

        return jax.lax.scan(add, jnp.zeros(x.shape[1]), length=3)[0]

    (found,) = collectives(compiled(three_times, (16, 7), PartitionSpec("data")))
    assert (found.kind, found.times) == ("all-reduce", 15)


def whole(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def test_an_array_made_whole_on_every_device_is_an_all_gather():
    (found,) = collectives(compiled(whole, (16, 7), PartitionSpec("data")))
    assert (found.kind, found.shapes, found.times) == ("all-gather", ("f32[16,7]",), 1)
    assert found.bytes == 16 * 7 * 4 * 7 / 8


def test_rows_that_become_columns_are_an_all_to_all():
    def columns(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, "data"))

    (found,) = collectives(compiled(columns, (16, 24), PartitionSpec("data")))
    assert found.kind == "all-to-all"
    assert found.bytes == pytest.approx(2 * 24 * 4 * 7 / 8), "of the rows that a device has"


@pytest.mark.parametrize("f", [five_sums, whole])
def test_one_device_sends_nothing(f):
    assert collectives(compiled(f, (16, 7), PartitionSpec("data"), devices=1)) == []


@pytest.mark.parametrize(
    "axis, groups",
    [("fsdp", [[0, 1, 2, 3], [4, 5, 6, 7]]), ("data", [[0, 4], [1, 5], [2, 6], [3, 7]])],
)
def test_what_is_exchanged_along_an_axis_of_the_mesh_stays_on_it(axis, groups):
    program = compiled(whole, (16, 7), PartitionSpec(axis), fsdp=4)
    (found,) = collectives(program)
    assert sorted(sorted(group) for group in found.groups.tolist()) == groups


# Lines as compilers write them


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups={{0,1,2,3}}, dimensions={0}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x={}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={1}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={1}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}, x={}", [[0, 1, 2, 3]]),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x={0}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x={0}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", [[0, 1], [1, 2], [2, 0]]),
    ],
)
def test_the_devices_that_exchange_in_each_way_of_writing(text, groups):
    assert (
        device_groups(f"%x = f32[3]{{0}} all-reduce(%y), channel_id=1, {text}").tolist() == groups
    )


ADD = """HloModule test

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
"""


def only(line: str) -> Collective:
    """The one collective of a program of one line."""
    (found,) = collectives(f"{ADD}\nENTRY %main (x: f32[]) -> f32[] {{\n  {line}\n}}\n")
    return found


GROUPS = "channel_id=3, replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    "line, kind, shapes, size",
    [
        (
            f"%a = f32[5,7]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add",
            "all-reduce",
            ("f32[5,7]",),
            140,
        ),
        (
            f"%a = (f32[5]{{0}}, bf16[7]{{0}}) all-reduce(%x, %y), {GROUPS}, to_apply=%add",
            "all-reduce",
            ("f32[5]", "bf16[7]"),
            34,
        ),
        (
            f"ROOT %a = bf16[4,7]{{1,0:T(8,128)S(1)}} all-gather(%x), {GROUPS}, dimensions={{0}}",
            "all-gather",
            ("bf16[4,7]",),
            56,
        ),
        (  # the result is a quarter of what goes in
            f"%a = f32[5,7]{{1,0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}, to_apply=%add",
            "reduce-scatter",
            ("f32[5,7]",),
            560,
        ),
        (
            "%a = f32[5]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            ("f32[5]",),
            20,
        ),
        (
            f"%a = (f32[3]{{0}}, f32[3]{{0}}) all-to-all(%x, %y), {GROUPS}",
            "all-to-all",
            ("f32[3]", "f32[3]"),
            24,
        ),
        # the starts of asynchronous ones
        (
            f"%a = (f32[1,7]{{1,0}}, f32[4,7]{{1,0}}) all-gather-start(%x), {GROUPS}",
            "all-gather",
            ("f32[4,7]",),
            112,
        ),
        (
            f"%a = ((f32[1,7]{{1,0}}, bf16[2]{{0}}), (f32[4,7]{{1,0}}, bf16[8]{{0}})) "
            f"all-gather-start(%x, %y), {GROUPS}",
            "all-gather",
            ("f32[4,7]", "bf16[8]"),
            128,
        ),
        (
            f"%a = (f32[5]{{0}}, f32[7]{{0}}) all-reduce-start(%x, %y), {GROUPS}, to_apply=%add",
            "all-reduce",
            ("f32[5]", "f32[7]"),
            48,
        ),
        (
            f"%a = f32[5]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add",
            "all-reduce",
            ("f32[5]",),
            20,
        ),
        (
            "%a = (f32[6]{0:T(8)}, f32[6]{0:T(8)}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2}}",
            "collective-permute",
            ("f32[6]",),
            24,
        ),
    ],
)
def test_a_collective_is_read_from_its_line(line, kind, shapes, size):
    found = only(line)
    assert (found.kind, found.shapes, found.size, found.times) == (kind, shapes, size, 1)


def test_the_end_of_an_asynchronous_collective_and_a_group_of_one_count_nothing():
    lines = [
        "%done = f32[4,7]{1,0} all-gather-done(%start), channel_id=3",
        "%alone = f32[4,7]{1,0} all-gather(%x), channel_id=4, replica_groups=[8,1]<=[8]",
        "%fused = f32[4,7]{1,0} fusion(%all-gather), kind=kLoop, calls=%body",
    ]
    program = "ENTRY %main (x: f32[]) -> f32[] {\n" + "\n".join(lines) + "\n}\n"
    assert collectives(program + "%body (x: f32[]) -> f32[] {\n}\n") == []


def test_the_result_of_a_start_is_its_second_half():
    halves = "((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0}))"
    assert result_shapes(halves, "reduce-scatter", True) == ("f32[8]", "f32[12]")
    assert result_shapes("(f32[2]{0}, f32[8]{0})", "all-gather", True) == ("f32[8]",)
    assert result_shapes("(f32[2]{0}, f32[8]{0})", "all-gather", False) == ("f32[2]", "f32[8]")


LOOPS = (
    ADD
    + """
%known_body (p: (s32[], f32[5])) -> (s32[], f32[5]) {
  %sum.1 = f32[5]{0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}

%known_condition (p: (s32[], f32[5])) -> pred[] {
  %bound.1 = s32[] constant(99)
}

%compared (i: s32[], n: s32[]) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%unknown_body (p: (s32[], f32[5])) -> (s32[], f32[5]) {
  %all = f32[40]{0} all-gather(%x), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %inner = (s32[], f32[5]) while(%p), condition=%known_condition, body=%known_body, \
backend_config={"known_trip_count":{"n":"3"}}
}

%unknown_condition (p: (s32[], f32[5])) -> pred[] {
  %bound.2 = s32[]{:T(128)} constant(7)
  ROOT %fused = pred[] fusion(%i, %bound.2), kind=kLoop, calls=%compared
}

ENTRY %main (x: f32[5]) -> f32[5] {
  %outer = (s32[], f32[5]) while(%t), condition=%unknown_condition, body=%unknown_body
}
"""
)


def test_a_loop_runs_as_often_as_the_compiler_noted_or_its_condition_says():
    found = {each.kind: each.times for each in collectives(LOOPS)}
    assert found == {"all-gather": 7, "all-reduce": 21}
    programs = computations(LOOPS)
    assert trip_count(programs, programs["main"][1]) == 7
    assert trip_count(programs, programs["unknown_body"][2]) == 3


def test_every_line_is_walked_with_the_times_that_it_runs():
    lines = list(walk(computations(LOOPS), "main", 1))
    assert [times for name, line, times in lines if "while(" in line] == [1, 7]
    assert [times for name, line, times in lines if name == "add" and "sum" in line] == [21]


def test_the_branches_of_a_condition_and_a_called_computation_are_walked():
    bodies = [
        f"%{name} (x: f32[]) -> f32[] {{\n"
        f"  %s = f32[{n}]{{0}} all-gather(%x), channel_id={n}, replica_groups=[1,8]<=[8]\n}}"
        for name, n in [("one", 1), ("two", 2), ("three", 3)]
    ]
    entry = """ENTRY %main (x: f32[]) -> f32[] {
  %c = f32[] conditional(%p, %x, %x), branch_computations={%one, %two}
  %d = f32[] call(%x), to_apply=%three
}"""
    found = collectives("\n\n".join([*bodies, entry]))
    assert sorted(each.shapes[0] for each in found) == ["f32[1]", "f32[2]", "f32[3]"]


TPU = (
    ADD
    + """
%all-reduce-scatter.2.clone (input: f32[40,120]) -> f32[40,32] {
  %whole = f32[40,128]{1,0} all-reduce(%input), channel_id=1, replica_groups=[2,4]<=[8], \
to_apply=%add
  ROOT %part = f32[40,32]{1,0} dynamic-slice(%whole, %zero, %start)
}

%all-reduce-scatter.3 (input: f32[64]) -> f32[16] {
  %whole.1 = f32[64]{0} all-reduce(%input), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part.1 = f32[16]{0} dynamic-slice(%whole.1, %start)
}

%fused_computation.1 (x: f32[4]) -> f32[16] {
  %gathered = f32[16]{0} all-gather(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.2 (x: f32[4]) -> f32[16] {
  %gathered.1 = f32[16]{0} all-gather(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[40,120]) -> f32[40,32] {
  %large = f32[40,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2.clone
  %small = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %start = f32[16]{0} fusion(%x), kind=kCustom, calls=%fused_computation.1
  %rest = f32[16]{0} fusion(%start), kind=kCustom, calls=%async_collective_fusion.2
}
"""
)


def test_a_tpus_all_reduce_scatter_fusions_are_reduce_scatters_of_what_goes_in():
    found = [each for each in collectives(TPU) if each.kind != "all-gather"]
    assert {each.kind for each in found} == {"reduce-scatter"}
    sizes = sorted(each.size for each in found)
    assert sizes == [4 * 64, 4 * 40 * 128], "a TPU's compiler gives unlike ones one channel"


def test_a_collective_that_is_spread_over_fusions_counts_once():
    (found,) = [each for each in collectives(TPU) if each.kind == "all-gather"]
    assert (found.times, found.bytes) == (1, 64 * 3 / 4)


# The training step

# 8 x 13: neither it nor its half is the length of another axis of the step
BATCH = 104
DEPTH = 3


def step_config(fsdp: int, accumulate=1, dtype="float32", **model) -> Config:
    return tiny_config(
        model=dict(hidden_size=40, depth=DEPTH, num_heads=5) | model,
        data=dict(flip=False),
        objective=dict(variance="fixed_small"),
        optim=dict(accumulate=accumulate),
        mesh=dict(fsdp=fsdp),
        train=dict(batch_size=BATCH * accumulate, dtype=dtype),
    )


@dataclass(frozen=True)
class Step:
    """The compiled step of a config, in which nearly every parameter is sharded."""

    text: str
    model: DiT  # abstract

    @property
    def found(self) -> list[Collective]:
        return collectives(self.text)

    def of(self, kind: str) -> list[Collective]:
        return [each for each in self.found if each.kind == kind]

    @property
    def layer_shapes(self) -> set[tuple[int, ...]]:
        """Of the parameters of one block."""
        return {leaf.shape[1:] for leaf in jax.tree.leaves(self.model.blocks)}

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """Of all parameters, those of the blocks as one block has them."""
        others = [leaf for leaf in jax.tree.leaves(self.model) if leaf.shape[0] != DEPTH]
        return self.layer_shapes | {leaf.shape for leaf in others}

    def batch_arrays(self, rows: int) -> set[str]:
        """The arrays of the program whose leading axis has so many rows."""
        return set(re.findall(rf"\w+\[{rows}(?:,\d+)*\]", self.text))


def compile_step(config: Config, devices: list[jax.Device], small=100) -> Step:
    mesh = make_mesh(config, devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALL", small)
        text = train.compile_train_step(config, mesh).as_text()
        return Step(text, abstract_state(config, mesh).model)


@functools.cache
def step_of(fsdp: int, accumulate=1, conditioning="in_context") -> Step:
    """On eight devices. The in-context design has fewest parameters and compiles fastest."""
    config = step_config(fsdp, accumulate, conditioning=conditioning)
    return compile_step(config, jax.devices())


def dimensions(shape: str) -> tuple[int, ...]:
    """`f32[1,40,80]` to (40, 80)."""
    found = tuple(int(n) for n in re.findall(r"[\[,](\d+)", shape))
    return found[1:] if found[:1] == (1,) else found


def gathered(step: Step, in_loops: bool) -> set[tuple[int, ...]]:
    """The shapes of what the step gathers inside or outside the loop over the blocks."""
    found = [each for each in step.of("all-gather") if (each.times > 1) == in_loops]
    return {dimensions(shape) for each in found for shape in each.shapes}


@pytest.mark.parametrize("fsdp", [8, 4])
def test_with_fsdp_weights_are_gathered_a_layer_at_a_time_and_activations_never(fsdp):
    step = step_of(fsdp, conditioning="adaln_zero")
    assert not step.batch_arrays(BATCH)
    assert not step.batch_arrays(BATCH // 2), "the rows that the devices along fsdp have"
    kernels = {shape for shape in step.layer_shapes if len(shape) == 2}
    assert kernels <= gathered(step, in_loops=True) <= step.layer_shapes
    assert gathered(step, in_loops=False) <= step.shapes
    assert {each.kind for each in step.found} == {"all-gather", "all-reduce"}
    assert {each.times for each in step.of("all-gather")} == {1, DEPTH}


def test_without_gather_the_compiler_gathers_activations(monkeypatch):
    """What the test above is for, and that it can fail."""
    monkeypatch.setattr(linear, "gather", lambda weights: weights)
    monkeypatch.setattr(model, "gather", lambda weights: weights)
    step = compile_step(step_config(8, conditioning="in_context"), jax.devices())
    assert step.batch_arrays(BATCH)
    assert not gathered(step, in_loops=True) <= step.layer_shapes


def test_without_fsdp_gradients_are_added_up_and_nothing_is_gathered():
    step = step_of(1)
    assert {each.kind for each in step.found} == {"all-reduce"}
    assert sum(each.times * each.size for each in step.found) >= 4 * count_parameters(step.model)


def crosses_data(collective: Collective, fsdp: int) -> bool:
    """Whether it is between devices that have different places along `data`."""
    return any(len(set(group // fsdp)) > 1 for group in collective.groups)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_accumulated_gradients_are_added_up_over_data_once(fsdp):
    step = step_of(fsdp, accumulate=4)
    over_data = [each for each in step.found if crosses_data(each, fsdp)]
    assert {(each.kind, each.times) for each in over_data} == {("all-reduce", 1)}
    size = sum(each.size for each in over_data)
    whole = 4 * count_parameters(step.model)
    assert whole / fsdp <= size < whole / fsdp + 3000, "each device's share, and small tensors"


def test_with_fsdp_accumulation_gathers_each_layer_for_each_part():
    step = step_of(4, accumulate=4)
    kernels = {shape for shape in step.layer_shapes if len(shape) == 2}
    repeated = [each for each in step.of("all-gather") if each.times == 4 * DEPTH]
    assert kernels <= {dimensions(each.shapes[0]) for each in repeated} <= step.layer_shapes
    assert not any(crosses_data(each, 4) for each in step.found if each.times > 1)


@pytest.mark.parity
@pytest.mark.parametrize("fsdp", [8, 4])
@pytest.mark.parametrize("topology", ["h100:8", "v5e:2x4"])
def test_accelerators_gather_in_bfloat16_and_scatter_gradients_in_float32(topology, fsdp):
    config = step_config(fsdp, dtype="bfloat16", hidden_size=256, num_heads=2)
    step = compile_step(config, devices_of(topology), small=1000)
    assert not step.batch_arrays(BATCH)
    assert not step.batch_arrays(BATCH // 2)

    # compilers transpose and split what they gather
    sizes = {math.prod(shape) for shape in step.shapes}
    all_gathered = [shape for each in step.of("all-gather") for shape in each.shapes]
    assert {math.prod(dimensions(shape)) for shape in all_gathered} <= sizes
    kernels = sum(math.prod(shape) for shape in step.layer_shapes if len(shape) == 2)
    of_blocks = [each for each in step.of("all-gather") if each.shapes[0].startswith("bf16")]
    in_all = sum(each.times * each.size for each in of_blocks)  # loops may be unrolled in part
    passes = 2 * DEPTH - 1  # forward and backward, which may share the last block's
    assert in_all >= passes * 2 * kernels

    scattered = step.of("reduce-scatter")
    assert {shape[:4] for each in scattered for shape in each.shapes} == {"f32["}
    assert sum(each.times * each.size for each in scattered) >= DEPTH * 4 * kernels
    reduced = [shape for each in step.of("all-reduce") for shape in each.shapes]
    in_bfloat16 = [shape for shape in reduced if shape.startswith("bf16")]
    assert all(len(dimensions(shape)) == 1 for shape in in_bfloat16), "biases that are gathered"
