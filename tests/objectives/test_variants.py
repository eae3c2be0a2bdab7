"""Variants of the training objective: which of them estimate the bound, by enumeration, and that training draws them.

Three ordinary tokens, three positions, and a predictor that is a table: every canvas has hidden states of its own.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada import accounting
from llada.config import ObjectiveConfig, default_config, from_config_dict
from llada.errors import UserError
from llada.objectives import corruption, diffusion, families, time_law
from llada.objectives import noise as noise_lib
from llada.objectives.contract import ANSWER, Examples, SpecialTokens
from llada.objectives.noise import Noise

L, V, D = 3, 4, 8
MASK = 3
SPECIAL = SpecialTokens(mask=MASK, eos=2)
EPS = 1e-2

RNG = np.random.default_rng(0)
HEAD_VD = RNG.normal(size=(V, D)).astype(np.float32)
HIDDEN_CLD = RNG.normal(size=(V**L, L, D)).astype(np.float32)  # C = 64 canvases
LOGITS_CLV = np.einsum("cld,vd->clv", HIDDEN_CLD, HEAD_VD).astype(np.float64)
NATS_CLV = np.log(np.exp(LOGITS_CLV).sum(-1, keepdims=True)) - LOGITS_CLV
TEXT = np.array([0, 2, 1])
SETS = list(itertools.product((False, True), repeat=L))

LAWS = {
    "uniform": {},
    "bell": {"time_law": "logit_normal"},
    "bell and uniform": {"time_law": "logit_normal", "time_mean": -0.5, "time_std": 1.5, "time_uniform_share": 0.2},
    "band": {"time_law": "band", "time_low": 0.1, "time_high": 0.8},
}
WEIGHTS = {"elbo": {}, "paper": {}, "clipped": {"weight_bound": 1.5}, "flat": {}}
MASKS = ("bernoulli", "exact_count", "complementary")


def variants(prefix=0.0):
    """Every combination that a config may have, by name."""
    for (law, keys), (weight, bound), masks in itertools.product(LAWS.items(), WEIGHTS.items(), MASKS):
        values = keys | bound | {"weight": weight, "masks": masks, "clean_prefix": prefix, "eps": EPS}
        values |= {"random_length_fraction": 0.0}
        if accepted(values):
            yield f"{law}, {weight}, {masks}", ObjectiveConfig(**values)


def accepted(values):
    config = default_config()
    config.train.steps = 1
    config.objective.update(values)
    try:
        from_config_dict(config)
    except UserError:
        return False
    return True


def canvas_index(x_BL):
    return sum(x_BL[..., i] * V**i for i in range(L))


def nats_of(masked_BL, text=TEXT):
    """Nats of the masked tokens, given the others; (B,) float64."""
    masked_BL = np.asarray(masked_BL)
    nats_BLV = NATS_CLV[canvas_index(np.where(masked_BL, MASK, text))]
    return (nats_BLV[:, np.arange(L), text] * masked_BL).sum(axis=1)


def predict(xt_BL, lengths_B):
    return jnp.asarray(HIDDEN_CLD)[canvas_index(xt_BL)]


def bound_between(low, high, maskable=(True,) * L):
    """E over p ~ U[low, high] of E over masks of nats/p: Eq. (3), by quadrature of a polynomial."""
    p = low + (high - low) * (np.arange(4000) + 0.5) / 4000
    sets = [m for m in SETS if any(m) and not any(np.array(m) & ~np.array(maskable))]
    free = sum(maskable)
    return sum(np.mean(p ** (sum(m) - 1) * (1 - p) ** (free - sum(m))) * nats_of(np.array([m]))[0] for m in sets)


def expected(o, maskable=(True,) * L, grid=2**13):
    """E[weight x nats] of one sequence with these maskable tokens, over u on a grid and over all masks.

    Probabilities of masks are written out here; what `drawn` says are the weights, and which uniforms mask.
    """
    u_B = jnp.asarray((np.arange(grid) + 0.5) / grid, jnp.float32)
    t_B = time_law.quantile(u_B, o)
    x0_BL, maskable_BL = (jnp.asarray(np.tile(x, (grid, 1))) for x in (TEXT, np.array(maskable)))
    total_B = np.zeros(grid)
    if o.masks == "exact_count":
        orders = list(itertools.permutations(range(L)))
        for order in orders:
            uniform_BL = jnp.tile(jnp.array(order, jnp.float32) / L, (grid, 1))
            c = corruption.drawn(x0_BL, t_B, uniform_BL, maskable_BL, None, MASK, o)
            total_B += np.asarray(c.weight_B, np.float64) * nats_of(c.masked_BL) / len(orders)
        return total_B.mean()
    pair = (False, True) if o.masks == "complementary" else (None,)
    t64 = np.asarray(t_B, np.float64)
    p_B = (1 - 2 * o.eps) * t64 + o.eps if len(pair) == 2 else (1 - o.eps) * t64 + o.eps
    for second, chosen in itertools.product(pair, SETS):
        uniform_BL = jnp.tile(jnp.where(jnp.array(chosen), 0.0, 1 - 2**-24), (grid, 1))
        second_B = None if second is None else jnp.full(grid, second)
        c = corruption.drawn(x0_BL, t_B, uniform_BL, maskable_BL, second_B, MASK, o)
        # The first of a pair masks what is `chosen`, the second the others; either way it comes from u < p.
        probability_B = p_B ** sum(chosen) * (1 - p_B) ** (L - sum(chosen))
        np.testing.assert_array_equal(c.masked_BL[0], (np.array(chosen) ^ bool(second)) & np.array(maskable))
        total_B += probability_B * np.asarray(c.weight_B, np.float64) * nats_of(c.masked_BL) / len(pair)
    return total_B.mean()


def test_every_combination_is_an_estimate_of_the_bound_or_says_that_it_is_not():
    """LLaDA Eqs. (3) and (6): 42 combinations, the bound enumerated; `estimates_bound` is right about all of them."""
    bounds = {
        "bernoulli": bound_between(EPS, 1),
        "exact_count": bound_between(0, 1),
        "complementary": bound_between(EPS, 1 - EPS),
    }
    counted = 0
    for name, o in variants():
        off = expected(o) / bounds[o.masks] - 1
        assert (abs(off) < 3e-4) == corruption.estimates_bound(o), (name, off)
        assert corruption.estimates_bound(o) or abs(off) > 1e-3, (name, off)  # what is no bound differs by more
        assert families.DIFFUSION.bound_trained(o) == corruption.estimates_bound(o)
        counted += 1
    assert counted == 42
    assert not any(corruption.estimates_bound(o) for _, o in variants(prefix=0.5))


@pytest.mark.parametrize("prefix", [0.0, 0.6])
def test_training_draws_what_was_enumerated(prefix):
    """The mean of `loss` over 1,500 steps of 16 sequences, within 4.5 standard errors; its tokens and masked rows."""
    B, steps = 16, 1500
    x0_BL = jnp.tile(jnp.asarray(TEXT), (B, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def losses(o):
        def at(step):
            noise = Noise(0, step, jnp.arange(B), B)
            return diffusion.loss(predict, jnp.asarray(HEAD_VD), x0_BL, noise, SPECIAL, o)

        return jax.vmap(at)(jnp.arange(steps))

    chosen = [
        *("bell, paper, bernoulli", "bell and uniform, elbo, bernoulli", "uniform, flat, complementary"),
        *("band, clipped, exact_count", "bell and uniform, elbo, complementary", "bell and uniform, elbo, exact_count"),
    ]
    of_name = dict(variants(prefix))
    for name in chosen:
        o = dataclasses.replace(of_name[name], head_rows=64)
        terms = losses(o)
        maskables = [((True,) * L, 1 - prefix)]
        maskables += [((False,) + (True,) * 2, prefix / 2), ((False,) * 2 + (True,), prefix / 2)]
        want = B * sum(share * expected(o, maskable) for maskable, share in maskables if share)
        nats_S = np.asarray(terms.nats, np.float64)
        assert abs(nats_S.mean() - want) < 4.5 * nats_S.std() / math.sqrt(steps), name
        tokens = B * sum(share * sum(maskable) for maskable, share in maskables)
        count_S = np.asarray(terms.token_count)
        assert abs(count_S.mean() - tokens) <= 4.5 * count_S.std() / math.sqrt(steps), name
        masked_S = np.asarray(terms.head_count)
        rows = B * L * corruption.head_fraction(o, L)
        # Where l is drawn, the part of t L that is cut off is 1/2 on average for the uniform law only.
        slack = 0.03 * rows if o.masks == "exact_count" else 1e-6
        assert abs(masked_S.mean() - rows) < 4.5 * masked_S.std() / math.sqrt(steps) + slack, name


def test_complementary_masks_score_every_token_of_a_pair_once():
    o = ObjectiveConfig(masks="complementary", random_length_fraction=0.5, clean_prefix=0.5)
    B, length = 12, 9
    noise, second_B = corruption.paired(Noise(3, 5, jnp.arange(B), B), o)
    lengths_B = noise_lib.lengths(noise, length, o.random_length_fraction)
    valid_BL = jnp.arange(length)[None] < lengths_B[:, None]
    maskable_BL = corruption.behind_prefix(valid_BL, noise, o)
    u_B = noise_lib.times(noise, "stratified")
    uniform_BL = noise_lib.uniform(noise, noise_lib.MASK, (length,))
    c = corruption.drawn(jnp.zeros((B, length), jnp.int32), u_B, uniform_BL, maskable_BL, second_B, 1, o)
    masked = np.asarray(c.masked_BL)
    assert np.array_equal(masked[::2] ^ masked[1::2], maskable_BL[::2]) and masked.any(axis=1).sum() > B / 2
    np.testing.assert_allclose(1 / c.weight_B[::2] + 1 / c.weight_B[1::2], 1, atol=1e-5)
    # Together with 1 - t, by which the second of a pair is masked, two times in each of B / 2 equal strata.
    both = np.concatenate([u_B[::2], 1 - np.asarray(u_B[::2])])
    assert sorted(np.floor(both * B / 2).tolist()) == sorted([*range(B // 2)] * 2)
    assert np.array_equal(u_B[::2], u_B[1::2])


def test_laws_of_t_have_the_distribution_density_and_mean_they_say():
    u = jnp.asarray((np.arange(2**16) + 0.5) / 2**16, jnp.float32)
    for name, keys in LAWS.items():
        o = ObjectiveConfig(**keys)
        t = time_law.quantile(u, o)
        assert float(t.min()) >= 0 and float(t.max()) < 1 and np.all(np.diff(t) >= 0), name
        np.testing.assert_allclose(time_law.cumulative(t, o), u, atol=2e-6, err_msg=name)
        assert abs(np.asarray(t, np.float64).mean() - time_law.mean(o)) < 2e-5, name
        # Its derivative, of a distribution function written out in float64.
        low, high, step = *np.quantile(t, (0.01, 0.99)), 1e-4
        middle = np.linspace(low, high, 101)
        location, scale, share = o.time_mean or 0.0, o.time_std or 1.0, o.time_uniform_share or 0.0

        def distribution(x, o=o, location=location, scale=scale, share=share):
            if o.time_law == "logit_normal":
                z = (np.log(x / (1 - x)) - location) / scale
                bell = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])
                return (1 - share) * bell + share * x
            return np.asarray(time_law.cumulative(jnp.asarray(x), o), np.float64) if o.time_law == "band" else x

        slope = (distribution(middle + step) - distribution(middle - step)) / (2 * step)
        np.testing.assert_allclose(
            time_law.density(jnp.asarray(middle), o), slope, rtol=2e-3 if o.time_law != "band" else 5e-3, err_msg=name
        )


def test_times_of_any_law_are_dealt_evenly_to_devices():
    """Of 64 sequences any aligned run of 8 has about the batch's mean t; t and 1 - t sit side by side for even laws."""
    for name, keys in LAWS.items():
        o = ObjectiveConfig(**keys)
        for step in range(5):
            t_B = np.asarray(time_law.quantile(noise_lib.times(Noise(0, step, jnp.arange(64), 64), "stratified"), o))
            means = t_B.reshape(8, 8).mean(axis=1)
            assert np.abs(means - t_B.mean()).max() < 0.03, (name, means)


@pytest.mark.parametrize("keys", [LAWS["bell and uniform"], {"weight": "flat"}, LAWS["bell"] | {"weight": "paper"}])
def test_fine_tuning_has_the_same_laws_and_weights(keys):
    """A row that is one answer is a row of text: the two losses are equal, weight by weight."""
    o = ObjectiveConfig(**keys, random_length_fraction=0.0, normalization="token", head_rows=64)
    B = 8
    x0_BL, noise = jnp.tile(jnp.asarray(TEXT, jnp.int32), (B, 1)), Noise(1, 7, jnp.arange(B), B)
    whole = diffusion.loss(predict, jnp.asarray(HEAD_VD), x0_BL, noise, SPECIAL, o)
    batch = Examples(x0_BL, jnp.ones_like(x0_BL), jnp.full_like(x0_BL, ANSWER))
    answers = diffusion.answer_loss(predict, jnp.asarray(HEAD_VD), batch, noise, SPECIAL, o)
    for name in ("nats", "token_count", "head_nats", "head_count"):
        np.testing.assert_allclose(getattr(answers, name), getattr(whole, name), rtol=1e-5, err_msg=name)


def test_the_exact_flops_have_the_rows_that_meet_the_head():
    config = default_config()
    config.train.steps = 1
    config.objective.update(time_law="band", time_low=0.2, time_high=0.4, weight="paper", eps=0.0, clean_prefix=0.5)
    few, full = from_config_dict(config), from_config_dict({"train": {"steps": 1}})
    assert accounting.head_fraction(few) == pytest.approx(0.3 * 0.75)
    head = 6 * few.model.vocab_size * few.model.width
    saved = accounting.flops_exact_per_token(full) - accounting.flops_exact_per_token(few)
    assert saved == pytest.approx(head * (accounting.head_fraction(full) - 0.225))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"time_mean": 1.0}, "time_mean=1.0: it belongs to objective.time_law=logit_normal, and the law is uniform"),
        ({"time_law": "logit_normal", "time_low": 0.1, "weight": "flat"}, "it belongs to objective.time_law=band"),
        ({"time_law": "band", "time_low": 0.5, "time_high": 0.5, "weight": "flat"}, "time_high=0.5 is empty"),
        ({"time_law": "band", "time_low": 0.0, "time_high": 1.0, "weight": "flat"}, "is the uniform law; use that"),
        ({"time_law": "band", "weight": "flat"}, "a band needs both ends"),
        ({"time_law": "band", "time_low": 0.1, "time_high": 0.9}, "weight=elbo: a band leaves out a part of the bound"),
        ({"time_law": "logit_normal"}, "weight=elbo: with objective.time_law=logit_normal its importance weights have"),
        ({"weight": "clipped"}, "give its largest weight, --config.objective.weight_bound"),
        ({"weight_bound": 3.0}, "it belongs to objective.weight=clipped, and the weight is elbo"),
        ({"clean_prefix": 1.0}, "objective.clean_prefix=1.0"),
        ({"masks": "complementary", "batch": 7}, "train.batch_size must be even, not 7"),
        ({"name": "autoregressive", "time_law": "logit_normal"}, "time_law=logit_normal: it is for mask predictors"),
        ({"name": "autoregressive", "weight": "flat"}, "weight=flat: it is for mask predictors"),
        ({"name": "autoregressive", "masks": "complementary"}, "masks=complementary: it is for mask predictors"),
        ({"name": "autoregressive", "clean_prefix": 0.5}, "clean_prefix=0.5: it is for mask predictors"),
        ({"input_masking": 0.1}, "input_masking=0.1: it is for an ARM"),
        ({"masks": "exact_count", "source": "dialogues:x"}, "dialogues take bernoulli masks only"),
        ({"clean_prefix": 0.5, "source": "dialogues:x"}, "clean_prefix=0.5: a dialogue's prompt is never masked"),
    ],
)
def test_what_cannot_be_is_one_line(keys, words):
    keys = dict(keys)
    config = default_config()
    config.train.update(steps=1, batch_size=keys.pop("batch", 8))
    config.data.source = keys.pop("source", "stdlib")
    config.model.causal = keys.get("name") == "autoregressive"
    config.objective.update(keys, random_length_fraction=0.0)
    with pytest.raises(UserError) as refused:
        from_config_dict(config)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_variant_is_named_by_what_it_changes():
    assert ObjectiveConfig().variant == ""
    o = ObjectiveConfig(time_law="band", time_low=0.1, time_high=0.9, weight="flat", eps=0.0)
    assert o.variant == "time_law=band, time_low=0.1, time_high=0.9, weight=flat"
