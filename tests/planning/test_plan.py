"""Plans from real compilations for small TPU slices, against counts by hand; and the command with its refusals."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import in_process
import jax
import jax.numpy as jnp
import pytest

from llada import accounting, fsdp
from llada import mesh as mesh_lib
from llada.commands import experiment
from llada.config import MeshConfig, default_config, from_config_dict
from llada.errors import UserError
from llada.planning import fitting, hlo, programs, projection, report, search, topology, traffic

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
QUICKSTART = f"--config={EXPERIMENTS}/quickstart.py:llada"


def small(**changes):
    """Two layers whose FLOPs are quick to compile and easy to count."""
    c = default_config()
    c.model.update(dict(layers=2, width=256, heads=2, ffn=512, vocab_size=1024, max_length=64, dtype="bfloat16"))
    c.objective.update(dict(head_rows=64, random_length_fraction=0.0))
    c.data.sequence_length, c.train.batch_size, c.train.steps, c.mesh.fsdp = 64, 16, 10, 4
    for key, value in changes.items():
        group, name = key.split("__")
        c[group][name] = value
    return from_config_dict(c)


def compiled(config, name="v5e:2x2"):
    place = topology.describe(name)
    mesh = mesh_lib.make(config.mesh, place.devices)
    made = programs.make(config, mesh, "train", programs.Workload())
    done = programs.lower_and_compile(made, mesh)
    assert done.refusal is None
    return SimpleNamespace(place=place, mesh=mesh, program=made, compiled=done)


def planned(config):
    made = compiled(config)
    made.figures = report.figures(config, made.place, made.mesh, made.program, made.compiled)
    return made


@pytest.fixture(scope="session")
def step(libtpu):
    """The training step of `small()` on four v5e chips, and its figures."""
    return planned(small())


def test_a_step_without_recomputation_executes_its_useful_flops(libtpu):
    """The ARM's, whose head meets every row; here attention forms all scores, and half of them count as useful.

    Rotation is a product too: of queries and keys with C x C numbers, there and back.
    """
    config = small(objective__name="autoregressive", model__causal=True)
    flops = planned(config).figures["matrix_flops"]
    tokens, m = 16 * 64 / 4, config.model
    assert flops["useful"] == pytest.approx(tokens * accounting.flops_exact_per_token(config))
    beyond = m.layers * m.width * (6 * 64 + 2 * 2 * 2 * m.head_size)
    assert flops["executed"] == pytest.approx(flops["useful"] + tokens * beyond, rel=1e-6)


def test_the_head_meets_its_expected_rows_only(step):
    """Of 256 rows half need work; they go in blocks of 64 and then of 16, of which on average half of one is empty."""
    flops = step.figures["matrix_flops"]
    loops = [loop for loop in step.figures["loops"] if not loop["counted"]]
    assert len(loops) == 2 and all("vocabulary head" in loop["why"] for loop in loops)
    rows = sum(loop["turns"] * int(loop["why"].split()[-1]) for loop in loops)
    assert rows == pytest.approx(256 * 0.5005 + 16 / 2)
    head = 6 * 1024 * 256 * 64
    assert flops["executed"] < flops["dense_credit"] - head
    assert flops["executed"] == pytest.approx(flops["useful"] + head / 8, rel=0.15)


def test_loops_over_a_devices_own_rows_hold_no_collective(step):
    """Devices leave them after different numbers of turns: one inside would wait for those that have left."""
    module = hlo.Module(step.compiled.text, step.program.trips)
    own = [i for body in module.computations.values() for i in body if i.opcode == "while" and "_blocks" in i.path]
    assert len(own) == 2
    todo, seen = [loop.called("body")[0] for loop in own], []
    while todo:
        seen.append(todo.pop())
        for i in module.computations[seen[-1]]:
            assert not i.opcode.startswith(traffic.KINDS), i.name
            todo += [*i.callees, *(i.called("body") if i.opcode == "while" else [])]
    assert len(seen) > 10


def test_memory_is_counted_by_kind(step):
    memory = step.figures["hbm_bytes"]
    state = 12 * accounting.parameters(small().model).total / 4
    assert state < memory["arguments"] < 1.1 * state + 2**16
    assert memory["arguments"] < memory["peak"] < memory["capacity"]


def test_every_collective_of_fsdp_crosses_the_fsdp_axis(step):
    assert set(step.figures["traffic"]["bytes_by_axes"]) <= {"fsdp", "none"}
    assert step.figures["traffic"]["fsdp_over_minimum"] < 1.05


def test_gradients_of_the_layers_come_back_in_parts(step):
    """Never whole, which would be twice the bytes: (n - 1) / n of every matrix in bfloat16."""
    matrices = 2 * (4 * 256 * 256 + 3 * 256 * 512)
    moved = [entry["bytes"] for entry in step.figures["collectives"] if entry["kind"] == "reduce-scatter"]
    assert sum(moved) == 2 * matrices * 3 / 4


def test_the_embedding_is_gathered_once_for_all_microbatches(libtpu):
    made = compiled(small(train__microbatches=2))
    module = hlo.Module(made.compiled.text, made.program.trips)
    moved = traffic.Traffic(module, traffic.Links(made.mesh, made.place)).collectives
    tables = [c.times for c in moved if c.kind == "all-gather" and math.prod(c.array.dims) == 1024 * 256]
    assert sorted(tables) == [1, 2]  # the embedding, and the head in each


def test_the_report_says_what_it_is(step):
    shown = report.text(step.figures)
    assert "projection, not a measurement" in shown and "fsdp 4" in shown
    for word in (
        "arguments",
        "temporaries",
        "executed / useful",
        "all-gather",
        "least FSDP needs",
        "chip-hours",
        "MFU",
    ):
        assert word in shown
    json.dumps(step.figures)
    assert "assumed" not in step.figures and "NOT READ" not in shown
    assumed = [{"assumption": "loops of unknown trip count, counted once", "count": 2, "such_as": "%while.3"}]
    top = report.text(step.figures | {"assumed": assumed}).split("\n\n")[0]
    assert "NOT READ FROM THE PROGRAM: 2 loops of unknown trip count, counted once (such as %while.3)" in top


def test_collective_bytes_are_those_by_hand(libtpu):
    """A product with a weight split four ways: (n - 1) / n of it enters each device; the result is summed over all."""
    place = topology.describe("v5e:2x2")
    mesh = mesh_lib.make(MeshConfig(fsdp=4), place.devices)
    placed = mesh_lib.parameter_shardings(mesh, {"gate": jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)})
    weight = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16, sharding=placed["gate"])
    x = jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16, sharding=mesh_lib.sharding(mesh, "BLD"))
    with jax.set_mesh(mesh), topology.quiet():
        function = jax.jit(lambda x, w: jnp.sum(jnp.square((x @ w).astype(jnp.float32))))
        text = function.trace(x, weight).lower(lowering_platforms=("tpu",)).compile().as_text()
    module = hlo.Module(text)
    assert projection.matrix_flops(module) == 2 * 512 * 1024 * 2048
    moved = traffic.Traffic(module, traffic.Links(mesh, place)).collectives
    gathered = [c for c in moved if c.kind == "all-gather"]
    assert [(c.axes, c.bytes, c.times) for c in gathered] == [(("fsdp",), 1024 * 2048 * 2 * 3 / 4, 1)]
    summed = [c for c in moved if c.kind == "all-reduce"]
    assert [(c.axes, c.bytes) for c in summed] == [(("fsdp",), 2 * 4 * 3 / 4)]


# As the TPU compiler prints two scatters on the SparseCores: one channel, and both under way.
SCATTERS = """
HloModule by_hand

%scatter (p: bf16[8,128]) -> bf16[2,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %one = bf16[2,128]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%other (q: bf16[16,128]) -> bf16[4,128] {
  %q = bf16[16,128]{1,0} parameter(0)
  ROOT %two = bf16[4,128]{1,0} reduce-scatter(%q), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[8,128], b: bf16[16,128]) -> (bf16[2,128], bf16[4,128]) {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[16,128]{1,0} parameter(1)
  %s.1 = ((bf16[8,128]{1,0}), bf16[2,128]{1,0}) call-start(%a), async_execution_thread="sparsecore", to_apply=%scatter
  %s.2 = ((bf16[16,128]{1,0}), bf16[4,128]{1,0}) call-start(%b), async_execution_thread="sparsecore", to_apply=%other
  %d.1 = bf16[2,128]{1,0} call-done(%s.1)
  %d.2 = bf16[4,128]{1,0} call-done(%s.2)
  ROOT %both = (bf16[2,128]{1,0}, bf16[4,128]{1,0}) tuple(%d.1, %d.2)
}
"""


def test_collectives_of_one_channel_under_way_at_once_all_count(libtpu):
    place = topology.describe("v5e:2x2")
    links = traffic.Links(mesh_lib.make(MeshConfig(fsdp=4), place.devices), place)
    moved = traffic.Traffic(hlo.Module(SCATTERS), links).collectives
    assert sorted((c.kind, c.bytes, c.asynchronous) for c in moved) == [
        ("reduce-scatter", 3 * 2 * 128 * 2, True),
        ("reduce-scatter", 3 * 4 * 128 * 2, True),
    ]


@pytest.mark.parametrize(
    "attributes, group",
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, x", list(range(8))),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, x", [0, 1]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}, x", [0, 2]),
        ("replica_groups={}, x", list(range(8))),
    ],
)
def test_groups_in_every_notation(attributes, group):
    assert traffic.first_group(attributes, 8) == group


def test_slices_lie_along_data_first(libtpu):
    place = topology.describe("v5e:2x2", 2)
    mesh = mesh_lib.make(MeshConfig(data=4, fsdp=2), place.devices)
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    links = traffic.Links(mesh, place)
    assert links.rate([0, 1]) > links.rate([0, 4]) == topology.DCN
    with pytest.raises(UserError, match="2 slices"):
        mesh_lib.make(MeshConfig(data=1, fsdp=8), place.devices)


def test_gradients_cross_slices_once(libtpu):
    """Two slices sum the gradients of what each of their devices holds: at least 4 bytes a parameter and device."""
    config = small(mesh__fsdp=4)
    place = topology.describe("v5e:2x2", 2)
    mesh = mesh_lib.make(config.mesh, place.devices)
    program = programs.make(config, mesh, "train", programs.Workload())
    found = report.figures(config, place, mesh, program, programs.lower_and_compile(program, mesh))
    held = accounting.parameters(config.model).total / 4
    # float32 gradients, or bfloat16 ones where products make them; each sent, and the sum received.
    assert 2 * held < found["traffic"]["bytes_by_axes"]["data (DCN)"] < 4.5 * held
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_devices_of_every_generation(libtpu):
    for name, chips, devices in (
        ("v4:4x4x4", 64, 64), ("v5e:16x16", 256, 256), ("v5p:4x4x8", 128, 128), ("v6e:16x16", 256, 256),
        ("tpu7x:2x2x1", 4, 8),
    ):  # fmt: skip
        place = topology.describe(name)
        assert (place.chips, len(place.devices)) == (chips, devices)
        assert place.devices[0].device_kind == place.chip.kind


def test_a_search_prefers_less_recomputation_where_memory_allows(monkeypatch):
    """Arithmetic stands in for the compiler: memory grows with the batch, less remat is faster and larger."""
    place = topology.Slice("v5e:4x4", topology.CHIPS["v5e"], (4, 4), 1, [None] * 16)
    need = {"full": 1.0, "attention": 2.0, "dots": 3.0, "none": 9.0}
    speed = {"full": 1.0, "attention": 1.1, "dots": 1.2, "none": 1.3}
    tried, told = [], []

    def compile_(config, place, mesh, remat, sequences):
        tried.append((mesh.fsdp, remat, sequences))
        peak = topology.GIB * (4 / mesh.fsdp + need[remat] * sequences)
        fits = peak <= place.chip.capacity
        rate = speed[remat] * (1 + 0.01 * sequences) * (0.98 if mesh.fsdp == 16 else 1)
        projected = {"tokens_per_second_per_chip": rate, "seconds": 1 / rate, "useful_mfu": 0.5}
        figures = {"projection": projected, "matrix_flops": {"executed_over_useful": 1.0}} if fits else None
        model = dataclasses.replace(config.model, remat=remat)
        return search.Candidate(dataclasses.replace(config, mesh=mesh, model=model), sequences, peak, figures)

    monkeypatch.setattr(search, "_compile", compile_)
    config = small(train__batch_size=64, model__width=256)
    found = search.search(config, place, lambda text: None, told.append)
    assert (found.best.config.model.remat, found.best.config.mesh.fsdp, found.best.sequences) == ("none", 8, 1)
    assert all(candidate.fits for candidate in found.pareto) and found.best in found.pareto
    # Everything on half of the slice, from the largest batch down; there the best, and only that on the other meshes.
    assert tried[:3] == [(8, "full", 4), (8, "attention", 4), (8, "dots", 4)]
    assert tried[3:6] == [(8, "none", 4), (8, "none", 1), (8, "none", 2)]
    assert tried[6:] == [(2, "none", 1), (1, "none", 1), (16, "none", 1)]
    assert told[0] == search.HEADER and len(told) == len(tried) + 1
    assert "does not fit" in told[4] and told[4].split()[:6] == "2 x 8 x 1 none".split()
    # What fits with hardly anything to spare is shown, and not stopped at: 15.25 of 15.75 GiB for 14 sequences.
    need["full"] = 14.75 / 14
    tried.clear()
    tight = search.search(small(train__batch_size=14 * 16, model__width=256), place, lambda text: None, told.append)
    assert tried[:3] == [(8, "full", 14), (8, "full", 7), (8, "attention", 7)] and tight.candidates[0].fits
    table = search.text(found).splitlines()
    assert table[2].split()[:6] == "* 2 x 8 x 1".split() and "best within 92% of memory: " in table[-1]


def test_what_does_not_fit_is_named_for_every_remat():
    """Less recomputation keeps more."""
    axes, program = dict(data=1, fsdp=4, tensor=1), SimpleNamespace(name="train")
    saved = []
    for remat in ("offload", "full", "attention", "dots", "none"):
        config = small(model__remat=remat)
        saved += [size for name, size in fitting.largest_buffers(config, axes, program) if f"remat={remat}" in name]
    assert len(saved) == 5 and saved == sorted(set(saved))


# Devices per mesh axis, GiB that a v5e chip (15.75) would need, changes: the advice, and what it must leave out. Of the
# 1B model, 16.6 GiB are parameters and moments.
ONE_A_DEVICE = {"model.remat": "none", "train.batch_size": "16"}
ADVICE = {
    "more shards first": ((16, 1), 80, {}, ["alone are over: try --config.mesh.fsdp="], []),
    "microbatches": ((1, 16), 60, {}, ["try --config.train.microbatches=", "--search"], ["fsdp", "remat", "alone"]),
    "then remat": ((1, 16), 90, ONE_A_DEVICE, ["try --config.model.remat=full"], ["microbatches"]),
    "no more remat": ((1, 16), 900, ONE_A_DEVICE | {"model.remat": "offload"}, ["--search looks"], ["remat=full"]),
    "a larger slice": ((1, 1), 60, {}, ["16.62 GiB", "larger slice (of 2 devices"], ["microbatches", "fsdp=", "remat"]),
}


@pytest.mark.parametrize("name", ADVICE)
def test_no_advice_is_given_that_cannot_do(name):
    (data, fsdp), gibibytes, changes, words, absent = ADVICE[name]
    config = experiment.read(str(EXPERIMENTS / "llada_1b.py"), changes)
    axes, program = dict(data=data, fsdp=fsdp, tensor=1), SimpleNamespace(name="train")
    line = fitting.advice(config, axes, program, topology.CHIPS["v5e"], gibibytes * topology.GIB)
    assert all(word in line for word in words) and not any(word in line for word in absent), line


def test_a_model_that_no_remat_fits_is_told_in_one_line():
    place = topology.Slice("v5e:2x2", topology.CHIPS["v5e"], (2, 2), 1, [None] * 4)
    config = small(model__width=8192, model__layers=64, model__ffn=32_768)
    with pytest.raises(UserError, match="at any remat.*GiB of 15.8 a chip; use a larger slice"):
        search.search(config, place, *[lambda text: None] * 2)


ANSWER = ("--prompt_length=48", "--gen_length=16")
PLANNED = [
    ("likelihood", (), 4),
    ("likelihood", ("--estimator=sampler", "--block_length=8", *ANSWER), 4),
    ("likelihood", ("--estimator=is_greedy", *ANSWER), 4),
    ("evaluate", ("--dtype=bfloat16",), 2),
]


@pytest.mark.parametrize(("program", "flags", "size"), PLANNED)
def test_the_command_writes_its_figures(libtpu, tmp_path, program, flags, size):
    out = tmp_path / "plan.json"
    done = in_process.llada(
        *("plan", QUICKSTART, "--topology=v5e:2x2", f"--program={program}", *flags),
        *("--config.model.layers=2", "--config.mesh.fsdp=2", f"--json={out}"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(out.read_text())
    assert found["program"] == program and found["chips"] == 4 and found["mesh"]["fsdp"] == 2
    assert found["hbm_bytes"]["arguments"] == pytest.approx(size * found["parameters"] / 2, rel=0.1)
    assert "projection, not a measurement" in done.stdout


def test_options_that_libtpu_does_not_take_are_named_and_can_be_left_out(libtpu, monkeypatch):
    mesh = mesh_lib.make(MeshConfig(fsdp=4), topology.describe("v5e:2x2").devices)
    assert fsdp.TPU_OPTIONS.items() <= fsdp.compiler_options(mesh).items()
    monkeypatch.setitem(fsdp.TPU_OPTIONS, "xla_tpu_gone", True)
    with topology.quiet(), pytest.raises(UserError, match="option xla_tpu_gone .*--config.mesh.tpu_options=False"):
        fsdp.compiler_options(mesh)
    assert fsdp.compiler_options(mesh, wanted=False) is None


REFUSED = {
    "generation": (["--topology=v9:4x4"], ["v9", "v4, v5e, v5p, v6e, tpu7x"]),
    "flat shape": (["--topology=v5e:3x3"], ["--topology=v5e:3x3", "2x2", "16x16"]),
    "cube": (["--topology=v5p:4x4x6"], ["--topology=v5p:4x4x6", "multiples of 4", "8960"]),
    "no shape": (["--topology=v5p"], ["--topology=v5p", "4x4x8"]),
    "missing": ([], ["--topology is missing"]),
    "mesh": (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], ["mesh.fsdp=3", "4 device(s)"]),
    "batch": (["--topology=v5e:4x4", "--config.mesh.fsdp=16", "--config.train.batch_size=8"], ["batch_size=8", "16"]),
    "program": (["--topology=v5e:2x2", "--program=chat"], ["--program=chat", "train|evaluate|sample|likelihood"]),
    "sampling flag": (["--topology=v5e:2x2", "--steps=4"], ["--steps", "--program=train"]),
    "estimator": (["--topology=v5e:2x2", "--program=likelihood", "--estimator=x"], ["--estimator=x", "is_greedy"]),
    "heads": (["--topology=v5e:2x2", "--program=sample", "--config.mesh.tensor=4"], ["heads=3", "mesh.tensor=4"]),
    "slices": (["--topology=v5e:2x2", "--slices=2", "--config.mesh.fsdp=8"], ["2 slices", "--config.mesh.fsdp"]),
    "search": (["--topology=v5e:2x2", "--search", "--program=sample"], ["--search", "sample"]),
    "no slices": (["--topology=v5e:2x2", "--slices=0"], ["--slices=0", "from 1"]),
    "slices without end": (["--topology=v5p:4x4x8", "--slices=1000000000"], ["--slices=1000000000", "256"]),
    "numbers without end": ([f"--topology=v5p:4x4x{'9' * 5000}"], ["multiples of 4"]),
    "figures nowhere": (
        ["--topology=v5e:2x2", "--json=/proc/x/y.json"],
        ["--json=/proc/x/y.json", "cannot be written"],
    ),
    "figures to no file": (["--topology=v5e:2x2", "--json="], ["--json is empty"]),
    "searched batch": (["--topology=v5e:4x4", "--search", "--config.train.batch_size=3"], ["batch_size=3", "16 dev"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_get_one_line(libtpu, name):
    arguments, words = REFUSED[name]
    done = in_process.llada("plan", QUICKSTART, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words), line


def test_an_arm_takes_no_flags_of_the_reverse_process(libtpu):
    arm = f"--config={EXPERIMENTS}/quickstart.py:arm"
    done = in_process.llada("plan", arm, "--topology=v5e:2x2", "--program=sample", "--steps=4")
    assert done.returncode == 2 and "--steps needs a diffusion model" in done.stderr


def test_a_missing_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llada-jax\[tpu\]'"):
        topology.describe("v5e:2x2")


def test_what_does_not_fit_names_buffers_and_flags(libtpu):
    config = small(model__width=1024, model__layers=8, model__vocab_size=126_464, train__batch_size=64)
    place = topology.describe("v5e:2x2")
    mesh = mesh_lib.make(config.mesh, place.devices)
    program = programs.make(config, mesh, "train", programs.Workload())
    said = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (27.92G) exceeds available HBM (15.75G)."
    line = fitting.refusal(config, place, mesh.shape, program, said)
    assert "27.92G" in line and "15.75G" in line and "\n" not in line
    assert "parameters and moments" in line and "--config.train.microbatches=2" in line
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.03M of 16.00M vmem."
    line = fitting.refusal(config, place, mesh.shape, program, vmem)
    assert "on-chip memory" in line and "16.03M of 16.00M" in line
    assert fitting.wanted_bytes(said) == pytest.approx(27.92 * topology.GIB)
