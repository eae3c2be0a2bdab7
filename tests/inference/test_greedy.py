"""Which answer is a model's own: of all answers of a length exactly one, the one that its sampler writes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.config import MeshConfig, ModelConfig
from llada.inference import sampler
from llada.inference.ancestral import ancestral
from llada.inference.greedy import are_greedy
from llada.inference.likelihood import LikelihoodConfig
from llada.inference.mask_plans import Pair
from llada.inference.settings import SamplerConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

V, MASK, EOS, FORBIDDEN = 6, 3, 2, 5
SPECIAL = SpecialTokens(mask=MASK, eos=EOS)
MODEL = ModelConfig(layers=2, width=16, heads=2, ffn=24, vocab_size=V, max_length=16, init_std=0.7, dtype="float32")


@pytest.mark.parametrize("causal, scale", [(False, 0.0), (False, 1.5), (True, 0.0)])
def test_one_answer_of_a_length_is_greedy_and_the_sampler_writes_it(causal, scale):
    config = dataclasses.replace(MODEL, causal=causal)
    rng = np.random.default_rng(3)

    def normal(path, leaf):
        return np.float32(MODEL.init_std * rng.normal(size=leaf.shape) + ("norm" in str(path[-1])))

    params = jax.tree_util.tree_map_with_path(normal, transformer.abstract_parameters(config))
    prompts, A = [[], [4, 1, 0, 1]], 3
    answers = list(itertools.product((0, 1, 2, 4), repeat=A))
    pairs = [Pair(prompt, answer) for prompt in prompts for answer in answers]
    forbidden_V = np.arange(V) == FORBIDDEN
    forbidden_F = np.array([MASK, FORBIDDEN], np.int32)
    settings = LikelihoodConfig(cfg_scale=scale, batch_tokens=256)
    with jax.set_mesh(mesh_lib.make(MeshConfig(), jax.devices()[:1])):
        found = are_greedy(config, params, pairs, SPECIAL, forbidden_F, settings).reshape(len(prompts), len(answers))
        for prompt, greedy in zip(prompts, found, strict=True):
            canvas_BL = np.array([[*prompt, *[MASK] * A]], np.int32)
            if causal:
                sample = ancestral(config, params, canvas_BL, len(prompt), SPECIAL, forbidden_V, temperature=0)
            else:
                steps = SamplerConfig(steps=A, block_length=A, cfg_scale=scale)
                sample = sampler.reverse_process(config, params, canvas_BL, steps, SPECIAL, forbidden_V)
            written = tuple(np.asarray(sample.tokens_BL)[0, len(prompt) :].tolist())
            own = [answer for answer, is_greedy in zip(answers, greedy, strict=True) if is_greedy]
            if causal and EOS in written:  # its sampler stops there, and the law does not
                assert len(own) == 1 and own[0][: written.index(EOS) + 1] == written[: written.index(EOS) + 1]
            else:
                assert own == [written]
