"""Parameter and FLOP arithmetic against the model itself: shapes of its parameters, products in its program.

The products are counted twice: in the traced program by the walk below, in the lowered training step by XLA.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from llada import accounting
from llada.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens
from llada.objectives.vocabulary_head import block_sizes, weighted_nats
from llada.training.step import init_state, train_step


def model(layers, width, heads, kv_heads, ffn, vocab_size, **others) -> ModelConfig:
    return ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab_size=vocab_size, **others
    )


LLADA_8B = model(32, 4096, 32, 32, 12288, 126464)
ARM_7B = model(28, 4096, 32, 8, 13440, 126464, causal=True)
LLADA_1B = model(22, 2048, 32, 4, 5634, 126464)


# Total and non-embedding parameters: LLaDA Table 5, and the released checkpoints it does not list.
@pytest.mark.parametrize(
    ("config", "total", "non_embedding"),
    [
        pytest.param(LLADA_8B, 8_015_581_184, 6_979_588_096, id="LLaDA-8B"),
        pytest.param(ARM_7B, 6_834_851_840, 5_798_858_752, id="ARM-7B"),
        pytest.param(LLADA_1B, 1_487_243_264, 969_246_720, id="1B-ffn-5634"),
        pytest.param(dataclasses.replace(LLADA_1B, ffn=5632), 1_486_972_928, 968_976_384, id="1B-ffn-5632"),
        pytest.param(model(32, 4096, 32, 8, 14336, 128000), 8_028_164_096, 6_979_588_096, id="LLaMA3-8B-V128000"),
        pytest.param(model(32, 4096, 32, 8, 14336, 128256), 8_030_261_248, 6_979_588_096, id="LLaMA3-8B"),
        pytest.param(
            model(32, 4096, 32, 8, 14336, 155136, tie_embeddings=True), 7_615_025_152, 6_979_588_096, id="iLLaDA"
        ),
        pytest.param(model(3, 24, 4, 2, 40, 17, qk_norm=True), 14_844, 14_028, id="qk_norm"),
        pytest.param(model(3, 24, 4, 2, 40, 17, qk_norm=True, tie_embeddings=True), 14_436, 14_028, id="tied"),
    ],
)
def test_counts_are_the_published_ones_and_those_of_the_shapes(config, total, non_embedding):
    """Arithmetic, the paper, and the summed shapes of the parameters that the model would make: one number."""
    shapes = transformer.abstract_parameters(config)
    sizes = {name: sum(math.prod(a.shape) for a in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    counted = accounting.ParameterCount(
        sum(sizes.values()), sum(n for name, n in sizes.items() if name not in ("embedding", "head"))
    )
    assert accounting.parameters(config) == counted == (total, non_embedding)


def product_flops(jaxpr) -> int:
    """2 x rows x contracted x columns, summed over every matrix product of a program and of the programs inside it.

    A scan counts as often as it turns; a loop whose turns are not known beforehand counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        inner = sum(product_flops(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


def config_of(m: ModelConfig, length: int, eps: float = 1e-3) -> Config:
    name = "autoregressive" if m.causal else "diffusion"
    return Config(model=m, data=DataConfig(sequence_length=length), objective=ObjectiveConfig(name=name, eps=eps))


def head_flops(config: Config) -> float:
    """Of the vocabulary head per token, were every position to meet it."""
    return 6.0 * config.model.vocab_size * config.model.width


@pytest.mark.parametrize("switches", [{}, {"qk_norm": True, "scan_unroll": 3}], ids=["scanned", "unrolled"])
def test_exact_flops_are_those_of_the_products_in_the_training_program(switches):
    """Forward and backward of the bidirectional hidden states, exactly; recomputation comes on top and is left out."""
    B, L = 2, 20
    config = config_of(model(3, 24, 4, 2, 40, 17, dtype="float32", **switches), L)

    def program(m):
        loss = lambda params: jnp.sum(transformer.hidden(m, params, jnp.zeros((B, L), jnp.int32)))  # noqa: E731
        return jax.make_jaxpr(jax.grad(loss))(transformer.abstract_parameters(m)).jaxpr

    without_head = accounting.flops_exact_per_token(config) - head_flops(config) * accounting.head_fraction(config)
    assert product_flops(program(config.model)) == round(B * L * without_head)
    assert product_flops(program(dataclasses.replace(config.model, remat="full"))) > B * L * without_head


def test_the_head_costs_six_flops_per_weight_and_row_that_meets_it():
    """One turn of each vocabulary loop, value and both gradients, is 6 V d for each of its rows."""
    B, L, D, V, rows = 2, 20, 24, 17, 8
    hidden, head = jax.ShapeDtypeStruct((B, L, D), "float32"), jax.ShapeDtypeStruct((V, D), "float32")

    def gradients(hidden, head):
        loss = lambda h, v: weighted_nats(h, v, jnp.zeros((B, L), jnp.int32), jnp.ones((B, L)), rows)[0]  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    once_each = sum(block_sizes(B * L, rows, jax.default_backend()))
    assert product_flops(jax.make_jaxpr(gradients)(hidden, head).jaxpr) == once_each * 6 * V * D


# So wide that elementwise work and AdamW, which XLA counts too, stay below half a percent of the products.
WIDE = dict(layers=2, width=1024, heads=4, kv_heads=2, ffn=1536, vocab_size=4096)
LENGTH, ROWS = 1024, 16384


def wide_step(causal: bool, length: int = LENGTH, **changes) -> Config:
    """A step of ROWS positions that XLA counts in full: it takes the body of a loop once, however often it turns.

    The scan over layers is unrolled, and all rows stand in one block of the vocabulary head.
    """
    shape = WIDE | changes
    config = config_of(model(**shape, causal=causal, max_length=length, scan_unroll=shape["layers"]), length)
    objective = dataclasses.replace(config.objective, head_rows=ROWS)
    return dataclasses.replace(config, objective=objective, train=TrainConfig(batch_size=ROWS // length, steps=10))


@functools.cache
def xla_flops(config: Config) -> float:
    """XLA's count per position of the whole lowered, not yet optimised step; nothing is compiled or allocated."""
    state = jax.eval_shape(functools.partial(init_state, config))
    batch = jax.ShapeDtypeStruct((config.train.batch_size, config.data.sequence_length), jnp.int32)
    step = functools.partial(train_step, config=config, special=SpecialTokens(mask=3, eos=1))
    return jax.jit(step).lower(state, batch).cost_analysis()["flops"] / ROWS


def attention_flops(config: Config) -> float:
    """Of the scores and of the values they mix, per token: what one more sequence length adds to the exact count."""
    twice = dataclasses.replace(config, data=DataConfig(sequence_length=2 * config.data.sequence_length))
    return accounting.flops_exact_per_token(twice) - accounting.flops_exact_per_token(config)


def program_flops(config: Config) -> float:
    """The exact count, and what the program of `wide_step` does beyond it.

    That is the head on the rows that are not masked, for one block holds them all, and the half of the scores that a
    causal model computes and then throws away.
    """
    unmasked_rows = head_flops(config) * (1 - accounting.head_fraction(config))
    scores_of_the_future = attention_flops(config) if config.model.causal else 0.0
    return accounting.flops_exact_per_token(config) + unmasked_rows + scores_of_the_future


@pytest.mark.parametrize("causal", [False, True], ids=["diffusion", "autoregressive"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"length": 2 * LENGTH}, id="length"),
        pytest.param({"vocab_size": 8192}, id="vocabulary"),
        pytest.param({"layers": 3}, id="layers"),
        pytest.param({"kv_heads": 4}, id="MHA"),
        pytest.param({"ffn": 3072}, id="ffn"),
        pytest.param({"width": 2048}, id="width"),
    ],
)
def test_exact_flops_are_those_that_xla_counts_in_the_training_step(causal, change, monkeypatch):
    """To 1 %: the whole count, and how much it grows when one thing changes, which no other part of it can hide."""
    monkeypatch.setattr("llada.model.attention.SHORT", 10 * LENGTH)  # a loop over queries would count once
    # So would one over smaller blocks, which no row is left for, or over pieces of the vocabulary.
    monkeypatch.setattr("llada.objectives.vocabulary_head.block_sizes", lambda N, block_rows, where: (block_rows,))
    monkeypatch.setattr("llada.objectives.vocabulary_head.PIECE", 10**6)
    before, after = wide_step(causal), wide_step(causal, **change)
    print()
    for config in (before, after):
        counted, expected = xla_flops(config), program_flops(config)
        print(f"XLA {counted:.6g}, arithmetic {expected:.6g} FLOP per token, ratio {counted / expected:.5f}")
        assert counted == pytest.approx(expected, rel=0.01)
        # No part is so small that the tolerance could cover for it.
        head, attention = head_flops(config), attention_flops(config) * (2 if causal else 1)
        assert min(head, attention, expected - head - attention) > 0.1 * expected
    counted, expected = xla_flops(after) - xla_flops(before), program_flops(after) - program_flops(before)
    print(f"growth: XLA {counted:.6g}, arithmetic {expected:.6g}, ratio {counted / expected:.5f}")
    assert expected > 0.05 * program_flops(before)
    assert counted == pytest.approx(expected, rel=0.01)


def test_published_flops_per_token():
    """Section 3.1's 6 N and the full accounting at 4096 tokens, to three digits, and how its pieces combine."""
    S = 4096
    llada_8b, llada_1b, arm_7b = (config_of(m, S) for m in (LLADA_8B, LLADA_1B, ARM_7B))
    assert accounting.flops_6nd_per_token(LLADA_8B) == pytest.approx(4.188e10, rel=5e-4)
    assert accounting.flops_6nd_per_token(LLADA_1B) == pytest.approx(5.815e9, rel=5e-4)
    # Masked positions alone meet the head: E[p] = (1 + eps) / 2 of them.
    assert accounting.head_fraction(llada_1b) == (1 + 1e-3) / 2
    assert accounting.head_fraction(arm_7b) == 1
    other = dataclasses.replace(arm_7b, objective=ObjectiveConfig(name="next but one"))
    with pytest.raises(KeyError, match="next but one"):
        accounting.flops_exact_per_token(other)
    with_full_head = accounting.flops_exact_per_token(llada_1b) + head_flops(llada_1b) * (1 - (1 + 1e-3) / 2)
    assert with_full_head == pytest.approx(9.584e9, rel=5e-4)
    # Where eps is 1 every position is masked; attention grows with the sequence, and a causal model needs half of it.
    assert accounting.flops_exact_per_token(config_of(LLADA_1B, S, eps=1.0)) == pytest.approx(with_full_head)

    def slope(m):
        at, after = (accounting.flops_exact_per_token(config_of(m, length)) for length in (S, S + 1))
        return after - at

    assert slope(LLADA_8B) == pytest.approx(12 * 32 * 4096)
    assert slope(ARM_7B) == pytest.approx(12 * 28 * 4096 / 2)
    assert accounting.flops_exact_per_token(llada_8b) > accounting.flops_6nd_per_token(LLADA_8B)
