"""The optimizer against AdamW written down with NumPy, and the schedule at a jump."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada.model import transformer
from llada.training import optimizer


def adamw(params, gradients, first, second, step, rate, o):
    """Loshchilov and Hutter 2019, Algorithm 2, with the decay scaled by the rate; `gradients` are clipped already."""
    out = []
    for name in params:
        m = first[name] = o.beta1 * first[name] + (1 - o.beta1) * gradients[name]
        v = second[name] = o.beta2 * second[name] + (1 - o.beta2) * gradients[name] ** 2
        update = m / (1 - o.beta1**step) / (np.sqrt(v / (1 - o.beta2**step)) + o.adam_eps)
        decay = 0.0 if "norm" in name else o.weight_decay
        out.append((name, params[name] - rate * (update + decay * params[name])))
    return dict(out)


def test_three_steps_are_those_of_adamw_in_numpy(tiny):
    """Different betas, an eps and a decay that show, steps that are clipped and one that is not, sums of 7 tokens."""
    changes = {"optimizer.beta1": 0.8, "optimizer.beta2": 0.99, "optimizer.weight_decay": 0.5}
    changes |= {"optimizer.adam_eps": 1e-3}
    config = tiny("arm", changes | {"optimizer.clip_norm": 2.0, "optimizer.schedule": "0:0 50%:1 100%:0.2"})
    shapes = transformer.abstract_parameters(config.model)
    names = [".".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(shapes)]
    assert any("norm" in name for name in names) and any("norm" not in name for name in names)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    update = jax.jit(optimizer.make(config).update)

    def flat(tree) -> dict:
        return dict(zip(names, (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)), strict=True))

    state = optimizer.make(config).init(tree)
    expected = flat(tree)
    first, second = ({name: np.zeros_like(leaf) for name, leaf in expected.items()} for _ in range(2))
    params, tokens = tree, 7.0
    for step, size in enumerate((3.0, 1e-3, 0.5), 1):
        sums = jax.tree.map(lambda leaf: (size * rng.normal(size=leaf.shape)).astype(np.float32), shapes)  # noqa: B023
        norm = np.sqrt(sum(np.sum((leaf / tokens) ** 2) for leaf in flat(sums).values()))
        clipped = {name: leaf / tokens * min(1.0, 2.0 / norm) for name, leaf in flat(sums).items()}
        assert (norm > 2.0) == (size != 1e-3)
        factor = optimizer.clip_factor(config.optimizer.clip_norm, jnp.float32(norm), jnp.float32(tokens))
        updates, state = update(sums, state, params, factor=factor)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        rate = 1e-2 * step / 6  # halfway is step 6 of 12, and the rate is that of the step's end
        expected = adamw(expected, clipped, first, second, step, rate, config.optimizer)
        for name, leaf in flat(params).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=2e-5, atol=1e-6, err_msg=f"{name} step {step}")


def test_a_jump_on_a_whole_step_comes_after_it(tiny):
    """12 steps: 50 % is the end of step 6, which still has the old rate; so has a position in tokens."""
    for schedule in ("0:1 50%:1 50%:0.5", "0:1 1536:1 1536:0.5"):
        rate = optimizer.learning_rate(tiny("llada", {"optimizer.schedule": schedule}))
        assert [float(rate(step)) for step in (4, 5, 6)] == pytest.approx([1e-2, 1e-2, 5e-3])
