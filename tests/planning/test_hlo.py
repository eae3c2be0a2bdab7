"""The reader of compiled programs against programs whose products and turns are known by hand; seconds made of them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada.planning import hlo, kernels, projection, topology, traffic


def module(function, *shapes, trips=None):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.Module(jax.jit(function).lower(*arguments).compile().as_text(), trips)


def flops(read):
    return projection.matrix_flops(read)


def test_a_product_in_nested_loops_counts_once_a_turn():
    def inner(x, _):
        return jnp.tanh(x @ jnp.eye(64) * 2), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return x @ jnp.ones((64, 64)), None

    read = module(lambda x: jax.lax.scan(outer, x, None, length=5)[0], (32, 64))
    once = 2 * 32 * 64 * 64
    assert flops(read) == 5 * (3 + 1) * once
    assert sorted((loop.trip_count, loop.entries) for loop in read.loops) == [(3, 5), (5, 1)]


def test_a_loop_that_depends_on_data_is_asked_for():
    def turn(_, x):
        return jnp.tanh(x @ jnp.ones((64, 64)))

    def function(x):
        return jax.lax.fori_loop(0, jnp.sum(x > 0), turn, x)

    read = module(function, (32, 64), trips=lambda path: (7.5, f"told: {path}"))
    (loop,) = read.loops
    assert not loop.counted and loop.trip_count == 7.5 and "while" in loop.why
    assert flops(read) == 7.5 * 2 * 32 * 64 * 64


def test_a_batched_product_counts_all_of_its_batch():
    read = module(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (6, 16, 32), (6, 32, 48))
    assert flops(read) == 2 * 6 * 16 * 32 * 48


# As the TPU compiler prints a loop: no trip count, an initial value through a copy, a limit in the tuple, a fused step.
LOOP = """
HloModule by_hand

%step (p: s32[]) -> s32[] {
  %p = s32[]{:T(128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  ROOT %add = s32[]{:T(128)} add(%p, %two)
}

%body (b: (s32[], bf16[8,128], s32[])) -> (s32[], bf16[8,128], s32[]) {
  %b = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %end = s32[]{:T(128)} get-tuple-element(%b), index=2
  %next = s32[]{:T(128)} fusion(%i), kind=kLoop, calls=%step, backend_config={"window_config":{"estimated_cycles":"10"}}
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} constant({...})
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf, _={"estimated_cycles":"90"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%next, %y, /*index=2*/%end)
}

%condition (c: (s32[], bf16[8,128], s32[])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c), index=0
  %end.1 = s32[]{:T(128)} get-tuple-element(%c), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end.1), direction=LT
}

ENTRY %main (x.1: bf16[8,128]) -> bf16[8,128] {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %eleven = s32[]{:T(128)} constant(11)
  %tuple = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%start, %x.1, %eleven)
  %while = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""


def test_turns_are_read_from_start_limit_and_step():
    read = hlo.Module(LOOP)
    assert [(loop.trip_count, loop.counted) for loop in read.loops] == [(6, True)]
    assert flops(read) == 6 * 2 * 8 * 128 * 128
    assert read.cycles(read.entry) == 6 * (10 + 90)


def test_a_limit_may_be_inclusive():
    text = LOOP.replace("direction=LT", "direction=LE").replace("constant(11)", "constant(10)")
    assert [loop.trip_count for loop in hlo.Module(text).loops] == [6]  # 0, 2 ... 10


def test_what_cannot_be_read_is_counted():
    """A limit that depends on data, a kernel that declares nothing, a type of no known size; groups and ends."""
    assert not hlo.Module(LOOP).unknown
    spoilt = LOOP.replace("s32[]{:T(128)} constant(11)", "s32[]{:T(128)} convert(%x.1)")
    spoilt = spoilt.replace(
        "  ROOT %out",
        '  %k = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"\n'
        "  %q = x9[8]{0} negate(%x)\n"
        "  %s = bf16[8,128]{1,0} all-reduce-start(%x), replica_groups=[every other one]\n"
        "  ROOT %out",
    )
    read = hlo.Module(spoilt)
    assert read.unknown == {
        "loops of unknown trip count, counted once": {"%while"},
        "kernels that declare no FLOPs, counted as none": {"%k"},
        "arrays of type x9, counted as no bytes": {"%q"},
    }
    place = topology.Slice("v5e:2x2", topology.CHIPS["v5e"], (2, 2), 1, [None] * 4)
    mesh = SimpleNamespace(devices=np.arange(4))
    links = SimpleNamespace(slice=place, mesh=mesh, axes=lambda group: ("fsdp",), rate=lambda group: len(group) * 1e9)
    moved = traffic.Traffic(read, links)
    assert moved.unknown == {
        "collectives whose devices cannot be read, taken to be all": {"%s"},
        "asynchronous collectives whose end is not found": {"%s"},
    }
    assert [c.seconds for c in moved.collectives] == [2 * 3 / 4 * (8 * 128 * 2) / 4e9]


def test_bytes_cycles_and_link_seconds_are_those_of_every_turn():
    """Of six turns: a counter, an input, a result and a matrix through HBM; of one, the counter's first value."""
    turn = 2 * 4 + 2 * (8 * 128 * 2) + 128 * 128 * 2
    read = hlo.Module(LOOP)
    assert projection.hbm_bytes(read) == 6 * turn + 2 * 4

    place = topology.Slice("v5e:2x2", topology.CHIPS["v5e"], (2, 2), 1, [None] * 4)
    links = SimpleNamespace(
        slice=place, mesh=SimpleNamespace(devices=np.arange(4)), axes=lambda group: ("fsdp",), rate=lambda group: 1e9
    )
    summed = LOOP.replace("convolution(%x, %w), dim_labels=bf_io->bf, ", "all-reduce(%x), replica_groups={{0,1,2,3}}, ")
    moved = traffic.Traffic(hlo.Module(summed), links)
    seconds = 6 * 2 * 3 / 4 * (8 * 128 * 2) / 1e9  # each enters a device twice, but for its own part; nothing hides it
    assert moved.exposed_seconds == moved.ici_seconds == pytest.approx(seconds) and moved.dcn_seconds == 0

    found = projection.project(read, moved, place)
    chip = place.chip
    assert found.matrix_flops == 6 * 2 * 8 * 128 * 128
    assert found.math_seconds == pytest.approx(found.matrix_flops / (0.8 * 197e12))
    assert found.hbm_seconds == pytest.approx(found.hbm_bytes / (0.9 * chip.hbm))
    assert found.roofline_seconds == max(found.math_seconds, found.hbm_seconds, found.ici_seconds)
    assert found.compiler_seconds == pytest.approx(6 * (10 + 90) / chip.clock + seconds)
    assert found.binding == "ICI" and found.seconds == found.compiler_seconds

    # Nothing to send, and a compiler that is too confident: the roofline stands. Chips of two devices do twice as much.
    quick = projection.project(read, traffic.Traffic(read, links), place._replace(chip=chip._replace(clock=1e15)))
    assert quick.seconds == quick.roofline_seconds == quick.hbm_seconds > 100 * quick.compiler_seconds
    twice = projection.project(read, moved, place._replace(chip=topology.CHIPS["tpu7x"]))
    assert (twice.matrix_flops, twice.hbm_bytes) == (2 * found.matrix_flops, 2 * found.hbm_bytes)


def test_a_sum_is_hidden_as_far_as_other_work_goes_on():
    """1,500 cycles at 1.5 GHz hide a microsecond of each turn's 3.072."""
    begun = LOOP.replace(
        "  %y = ",
        "  %s = bf16[8,128]{1,0} all-reduce-start(%x), replica_groups={{0,1,2,3}}\n"
        '  %z = bf16[8,128]{1,0} negate(%x), _={"estimated_cycles":"1500"}\n'
        "  %t = bf16[8,128]{1,0} all-reduce-done(%s)\n  %y = ",
    )
    place = topology.Slice("v5e:2x2", topology.CHIPS["v5e"], (2, 2), 1, [None] * 4)
    mesh = SimpleNamespace(devices=np.arange(4))
    links = SimpleNamespace(slice=place, mesh=mesh, axes=lambda group: ("fsdp",), rate=lambda group: 1e9)
    moved = traffic.Traffic(hlo.Module(begun), links)
    assert moved.ici_seconds == pytest.approx(6 * 3.072e-6)
    assert moved.exposed_seconds == pytest.approx(6 * 2.072e-6)


@pytest.mark.parametrize(
    "shapes, line, products",
    [
        # A projection to 3 heads of 64 channels, written as a window over heads that meets the one input once.
        (
            ("bf16[2,64,192,1]", "bf16[3,64,192,1]"),
            "f32[2,64,3,64] convolution(%a, %b), window={size=1x3 pad=0_0x2_2 rhs_reversal=0x1}, "
            "dim_labels=0bf1_1oi0->0b1f",
            2 * 64 * 192 * 3 * 64,
        ),
        # A convolution of width 3 over 10 places, padded by one on both sides: 28 of 30 places meet data.
        (
            ("f32[1,10,4]", "f32[3,4,5]"),
            "f32[1,10,5] convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            28 * 4 * 5,
        ),
        # Every second place only.
        (
            ("f32[1,10,4]", "f32[2,4,5]"),
            "f32[1,5,5] convolution(%a, %b), window={size=2 stride=2}, dim_labels=b0f_0io->b0f",
            10 * 4 * 5,
        ),
    ],
)
def test_convolutions_count_the_places_that_meet_data(shapes, line, products):
    text = f"""
ENTRY %main (a: {shapes[0]}, b: {shapes[1]}) -> f32[] {{
  %a = {shapes[0]} parameter(0)
  %b = {shapes[1]} parameter(1)
  ROOT %c = {line}
}}
"""
    assert flops(hlo.Module(text)) == 2 * products


def test_a_batched_product_as_a_window():
    """As a TPU program has it: 2 sequences x 3 heads of 64 x 64 scores over 32 channels, heads as a window of 3."""
    text = """
ENTRY %main (a: bf16[2,64,32,3], b: bf16[3,64,32,2]) -> f32[] {
  %a = bf16[2,64,32,3] parameter(0)
  %b = bf16[2,64,32,3] parameter(1)
  ROOT %c = f32[2,64,3,64] convolution(%a, %b), window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=0bf1_0oi1->0b1f
}
"""
    assert flops(hlo.Module(text)) == 2 * 2 * 3 * 64 * 64 * 32


def test_products_of_attention_kernels():
    operands = [(2, 32, 4096, 128), (2, 4, 4096, 128), (2, 4, 4096, 128)]
    product = 2 * 2 * 32 * 4096 * 4096 * 128
    assert kernels.flops("%splash_mha_fwd_segmented_residuals.2", "", operands, 3, False) == 2 * product
    assert kernels.flops("%splash_mha_fwd_residuals.2", "", operands, 3, True) == 2 * product * 10 / 16  # tiles
    assert kernels.flops("%splash_mha_dq.1", "", operands, 1, False) == 3 * product
    assert kernels.flops("%splash_mha_dkv.1", "", operands, 2, False) == 4 * product
    assert kernels.flops("%splash_mha_dkv_segmented.1", "", operands, 3, False) == 5 * product
    # Heads of 64 channels bring their queries with positions last.
    turned = [(2, 32, 64, 4096), (2, 4, 4096, 64), (2, 4, 4096, 64)]
    assert kernels.flops("%splash_mha_fwd_residuals.2", "", turned, 3, False) == 2 * product / 2
    assert kernels.efficiency("%splash_mha_fwd_residuals.2", turned) == kernels.SHARE / 2
    assert kernels.efficiency("%splash_mha_fwd_residuals.2", operands) == kernels.SHARE
    assert kernels.flops("%other", '"cost_estimate":{"flops":"123"}', operands, 1, False) == 123


# As the TPU compiler prints a layer's part of what all layers keep: taken and put back through fusions within.
STACKED = """
HloModule by_hand

%same (p: bf16[31,16,128]) -> bf16[31,16,128] {
  ROOT %p = bf16[31,16,128]{2,1,0} parameter(0)
}

%take (p.1: bf16[31,16,128], i.1: s32[]) -> bf16[1,16,128] {
  %p.1 = bf16[31,16,128]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %copy.1 = bf16[31,16,128]{2,1,0} fusion(%p.1), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%same
  ROOT %slice = bf16[1,16,128]{2,1,0} dynamic-slice(%copy.1, %i.1), dynamic_slice_sizes={1,16,128}
}

%put (p.2: bf16[31,16,128], i.2: s32[], new: bf16[1,16,128]) -> bf16[31,16,128] {
  %p.2 = bf16[31,16,128]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %new = bf16[1,16,128]{2,1,0} parameter(2)
  %copy.2 = bf16[31,16,128]{2,1,0} fusion(%p.2), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%same
  ROOT %update = bf16[31,16,128]{2,1,0} dynamic-update-slice(%copy.2, %new, %i.2)
}

ENTRY %main (a: bf16[31,16,128], i: s32[]) -> bf16[31,16,128] {
  %a = bf16[31,16,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %taken = bf16[1,16,128]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%take
  ROOT %b = bf16[31,16,128]{2,1,0} fusion(%a, %i, %taken), kind=kLoop, calls=%put
}
"""


def test_of_what_is_stacked_a_slice_is_read_and_written():
    alone = "ENTRY %main (a: f32[31,128]) -> f32[1,128] {\n  %a = f32[31,128]{1,0} parameter(0)\n"
    alone += "  ROOT %b = f32[1,128]{1,0} slice(%a), slice={[0:1], [0:128]}\n}\n"
    assert projection.hbm_bytes(hlo.Module(alone)) == 2 * 128 * 4
    index = 4  # bytes of i, read by both
    assert projection.hbm_bytes(hlo.Module(STACKED)) == 4 * (16 * 128 * 2) + 2 * index
