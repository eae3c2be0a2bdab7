"""Every implementation of attention against `at_once`, which test_transformer.py holds against numpy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from llada.model import attention, attention_kernels
from llada.model.attention import Allowed
from llada.model.layers import take

B, L, H, K, C = 2, 200, 4, 2, 8  # L is no multiple of a block or of a register
LENGTHS = jnp.array([130, L])
SEGMENTS = jnp.array(np.sort(np.random.default_rng(1).integers(0, 3, (B, L)), axis=1), jnp.int32)
CASES = {
    "plain": Allowed(),
    "lengths": Allowed(lengths_B=LENGTHS),
    "lengths segments": Allowed(False, LENGTHS, None, SEGMENTS, SEGMENTS),
    "causal lengths segments": Allowed(True, LENGTHS, None, SEGMENTS, SEGMENTS),
}
IMPLEMENTATIONS = {
    "blocks": functools.partial(attention.by_blocks, block=64),
    "splash": functools.partial(attention_kernels.splash_attention, interpret=True),
    "cudnn": functools.partial(attention_kernels.cudnn_attention, implementation="xla"),  # another kernel behind it
}


def draw(queries=L, channels=C):
    rng = np.random.default_rng(0)
    shapes = ((B, queries, H, channels), *((B, L, K, channels),) * 2)
    return [jnp.array(rng.normal(size=s), jnp.float32) for s in shapes]


def result_and_gradients(implementation, allowed, inputs):
    """Output and the gradients of its three inputs, from the positions that mean something."""
    lengths = jnp.array([L]) if allowed.lengths_B is None else allowed.lengths_B

    def total(*inputs):
        mixed = implementation(*inputs, allowed)
        meant = jnp.arange(mixed.shape[1])[None, None, None] < lengths[:, None, None, None]
        mixed = jnp.where(jnp.moveaxis(jnp.broadcast_to(meant, (B, 1, 1, mixed.shape[1])), -1, 1), mixed, 0)
        return jnp.sum(mixed * jnp.sin(jnp.arange(mixed.size)).reshape(mixed.shape)), mixed

    (_, mixed), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return mixed, *gradients


@functools.cache
def expected(name, channels=C):
    return result_and_gradients(attention.at_once, CASES[name], draw(channels=channels))


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(
    "kind, channels", [*((kind, C) for kind in IMPLEMENTATIONS), ("splash", attention_kernels.LANES)]
)
def test_all_implementations_agree(kind, channels, name):
    """Forward and gradients, four query heads over two key heads; splash also where a head fills a register."""
    got = result_and_gradients(IMPLEMENTATIONS[kind], CASES[name], draw(channels=channels))
    for mine, wanted in zip(got, expected(name, channels), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_segments_are_attended_to_as_sequences_of_their_own(causal):
    """Two documents in a row, and the second one alone; and queries at some positions of both."""
    q, k, v = draw()
    cut = 70
    segments = jnp.broadcast_to(jnp.arange(L) >= cut, (B, L)).astype(jnp.int32)

    @jax.jit
    def attend(q, k, v, lengths=None, at=None, of_queries=segments, of_keys=segments):
        return attention.attend(q, k, v, Allowed(causal, lengths, at, of_queries, of_keys))

    packed = attend(q, k, v)
    alone = attend(q[:, cut:], k[:, cut:], v[:, cut:], of_queries=None, of_keys=None)
    np.testing.assert_allclose(packed[:, cut:], alone, atol=1e-5)
    # A length that cuts the second document short, too.
    shorter = attend(q, k, v, LENGTHS)
    alone = attend(*(x[:1, cut : LENGTHS[0]] for x in (q, k, v)), of_queries=None, of_keys=None)
    np.testing.assert_allclose(shorter[:1, cut : LENGTHS[0]], alone, atol=1e-5)
    at = jnp.array([[150, 3, 71], [70, 69, L]])  # the last is padding
    some = attend(q[jnp.arange(B)[:, None], at], k, v, at=at, of_queries=take(segments, at))
    np.testing.assert_allclose(some[:, :2], packed[jnp.arange(B)[:, None], at[:, :2]], atol=1e-5)
    assert np.all(np.isfinite(some))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_blocks_of_queries_at_positions(causal):
    q, k, v = draw(queries=90)
    at = jnp.array(np.random.default_rng(2).integers(0, L + 5, (B, 90)))
    allowed = Allowed(causal, LENGTHS, at)
    got = attention.by_blocks(q, k, v, allowed, block=32)
    np.testing.assert_allclose(got, attention.at_once(q, k, v, allowed), atol=1e-5)


def test_blocks_hold_no_square_of_the_length():
    """Temporaries of the compiled gradient: linear in L by blocks, quadratic at once."""

    def temporaries(implementation, length):
        shapes = [jax.ShapeDtypeStruct((1, length, h, C), jnp.float32) for h in (H, K, K)]
        gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(implementation(q, k, v, Allowed())), argnums=(0, 1, 2)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(attention.by_blocks, 4096) < 2.5 * temporaries(attention.by_blocks, 2048)
    assert temporaries(attention.by_blocks, 4096) < temporaries(attention.at_once, 4096) / 10


@pytest.mark.parametrize(
    ("implementation", "platform", "kernel"),
    [
        (attention_kernels.splash_attention, "tpu", "call @_splash_attention"),
        (attention_kernels.cudnn_attention, "cuda", "custom_call @__cudnn$fmha"),
    ],
    ids=["splash", "cudnn"],
)
def test_saved_residuals_of_attention_spare_running_its_kernel_again(implementation, platform, kernel, monkeypatch):
    """The lowered program of a rematerialised block: kernels forward and backward, and no third."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)
    inputs = [x.astype(jnp.bfloat16) for x in draw()]
    times = {}
    for name, policy in (("residuals", attention.save_residuals), ("nothing", None)):
        block = jax.checkpoint(lambda q, k, v: implementation(2 * q, 2 * k, 2 * v, Allowed()), policy=policy)
        loss = lambda *inputs, block=block: jnp.sum(jnp.sin(block(*inputs).astype(jnp.float32)))  # noqa: E731
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        times[name] = gradient.trace(*inputs).lower(lowering_platforms=(platform,)).as_text().count(kernel)
    assert times == {"residuals": 2, "nothing": 3}


@pytest.mark.parametrize("length", [256, 1280, 4096])
def test_the_share_of_scores_of_a_causal_kernel_is_that_of_its_tiles(length):
    """As the kernel itself lists them, forward and backward."""
    kernel = attention_kernels.splash_kernel(True, (2, length, 64), length)
    for info in (kernel.fwd_mask_info, kernel.dkv_mask_info):
        done = np.asarray(info.block_mask) > 0
        assert np.sum(done) / done.size == attention_kernels.causal_share(length)


def test_the_platform_and_the_length_choose(monkeypatch):
    """Shapes only: which implementation `attend` takes on each platform; without a kernel that serves, by length."""
    taken = []
    for module in (attention, attention_kernels):
        for name in ("at_once", "by_blocks", "splash_attention", "cudnn_attention"):
            fake = lambda query, *_, name=name: taken.append(name) or query  # noqa: E731
            monkeypatch.setattr(module, name, fake, raising=False)

    def chosen(platform, length, dtype=jnp.bfloat16, causal=False, at=None):
        monkeypatch.setattr(attention_kernels, "platform", lambda: platform)
        monkeypatch.setattr(attention_kernels, "has_flash", lambda dtype, channels: dtype == jnp.bfloat16)
        x = jax.ShapeDtypeStruct((B, length, H, 64), dtype)
        position = None if at is None else jax.ShapeDtypeStruct((B, length), jnp.int32)
        attend = lambda x, at: attention.attend(x, x, x, Allowed(causal, None, at))  # noqa: E731
        jax.eval_shape(attend, x, position)
        return taken.pop()

    assert [chosen("cpu", n) for n in (64, attention.SHORT)] == ["at_once", "by_blocks"]
    assert [chosen("tpu", n) for n in (64, 512)] == ["at_once", "splash_attention"]
    assert [chosen("gpu", n) for n in (64, 512)] == ["at_once", "cudnn_attention"]
    assert chosen("gpu", 4096, jnp.float32) == "by_blocks"
    assert chosen("tpu", 4096, at=True) == "splash_attention"  # positions of queries are nothing to bidirectional ones
    assert chosen("tpu", 4096, causal=True, at=True) == "by_blocks"


@pytest.mark.parametrize(("capability", "most"), [("9.0", 256), ("10.0", 256), ("8.6", 128), ("7.5", 0), ("gfx90a", 0)])
def test_cudnn_gets_only_what_it_takes(capability, most, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    taken = [
        channels for channels in (4, 64, 128, 136, 256, 264) if attention_kernels.has_flash(jnp.bfloat16, channels)
    ]
    assert taken == [channels for channels in (64, 128, 136, 256) if channels <= most]
    assert not attention_kernels.has_flash(jnp.float32, 64)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_padding_whose_segment_was_cut_off_is_finite(causal):
    """Queries behind a length with no key left: their result means nothing, and must not be NaN in gradients."""
    segments = jnp.array([[0, 0, 1, 1]])
    x = jnp.ones((1, 4, 1, 2))
    allowed = Allowed(causal, jnp.array([2]), None, segments, segments)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(attention.at_once(x, x, x, allowed)))(x)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
