"""The samplers and the likelihood against PyTorch readings of the published loops, on the same weights.

`benchmarks/torch_reference.py` holds the readings: LLaDA's sampler and Monte Carlo likelihood, Fast-dLLM's caches.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from llada.config import ModelConfig
from llada.inference import likelihood, mask_plans, sampler
from llada.inference.settings import SamplerConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import inference_speed
import timing
import torch_reference as published

torch.set_num_threads(1)  # more would only spin beside JAX's

V, MASK = 50, 3
SPECIAL = SpecialTokens(mask=MASK, eos=1)
COMMON = dict(layers=3, width=32, heads=4, ffn=48, vocab_size=V, max_length=40, init_std=0.3, dtype="float32")
MODELS = {
    "plain": ModelConfig(**COMMON),
    "grouped, tied, qk-norm": ModelConfig(**COMMON, kv_heads=2, tie_embeddings=True, qk_norm=True),
}
FORBIDDEN = np.isin(np.arange(V), [0, 2, MASK])


@pytest.fixture(scope="module", params=list(MODELS))
def models(request):
    config = MODELS[request.param]
    params = transformer.init(config, jax.random.key(7))
    return config, params, published.from_jax(config, params)


@pytest.fixture(scope="module")
def prompt_BL():
    return np.random.default_rng(5).integers(4, V, (3, 9)).astype(np.int32)


def ours(config, params, prompt_BL, gen_length, **settings):
    masks = np.full((len(prompt_BL), gen_length), MASK, np.int32)
    canvas_BL = np.concatenate([prompt_BL, masks], axis=1)
    return sampler.reverse_process(config, params, canvas_BL, SamplerConfig(**settings), SPECIAL, FORBIDDEN)


def test_logits_are_the_same(models, prompt_BL):
    config, params, model = models
    theirs = model(torch.from_numpy(prompt_BL).long()).numpy()
    np.testing.assert_allclose(transformer.logits(config, params, prompt_BL), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        dict(steps=20, block_length=20),
        dict(steps=8, block_length=20),
        dict(steps=12, block_length=5),
        dict(steps=10, block_length=10, cfg_scale=1.0),
    ],
    ids=["pure", "quotas", "blocks", "guided"],
)
def test_greedy_sampling_gives_the_published_tokens(models, prompt_BL, settings):
    config, params, model = models
    got = ours(config, params, prompt_BL, 20, **settings)
    given = torch.from_numpy(prompt_BL).long()
    theirs, passes = published.generate(model, given, gen_length=20, mask_id=MASK, forbidden=FORBIDDEN, **settings)
    np.testing.assert_array_equal(got.tokens_BL, theirs.numpy())
    assert got.forward_passes == passes


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_sampling_gives_the_published_tokens_in_as_many_passes(models, prompt_BL, cache, threshold):
    config, params, model = models
    settings = dict(steps=20, block_length=5)
    row_BL = prompt_BL[:1]  # the published threshold loop counts passes of one sequence
    got = ours(config, params, row_BL, 20, cache=cache, confidence_threshold=threshold, **settings)
    theirs, passes = published.generate_cached(
        model,
        torch.from_numpy(row_BL).long(),
        gen_length=20,
        kind=cache,
        threshold=threshold,
        mask_id=MASK,
        forbidden=FORBIDDEN,
        **settings,
    )
    np.testing.assert_array_equal(got.tokens_BL, theirs.numpy())
    assert got.forward_passes == passes
    assert passes == 20 if threshold is None else passes < 20


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_likelihood_is_the_published_one_on_the_same_masks(models, prompt_BL, cfg_scale):
    config, params, model = models
    pair = likelihood.Pair(prompt_BL[0].tolist(), prompt_BL[1].tolist())
    settings = likelihood.LikelihoodConfig(draws=32, cfg_scale=cfg_scale)
    got = likelihood.log_likelihoods(config, params, [pair], SPECIAL, settings)[0]
    masks_MA, _ = mask_plans.draw_masks(pair, settings.estimator, settings.draws, MASK)
    theirs = published.log_likelihood(
        model,
        torch.tensor(pair.prompt),
        torch.tensor(pair.answer),
        torch.tensor(masks_MA),
        cfg_scale=cfg_scale,
        mask_id=MASK,
    )
    assert got.log_likelihood == pytest.approx(theirs, rel=1e-5)


def test_the_speed_benchmark_runs_and_asserts_parity():
    """A short sample of `benchmarks/inference_speed.py`, whose figures are taken at another shape."""
    for program in (
        inference_speed.sampling("toy", dual=False),
        inference_speed.sampling("toy", dual=True),
        inference_speed.scoring("toy"),
    ):
        timing.alternate(*program, pairs=1)  # fails where the two programs disagree
