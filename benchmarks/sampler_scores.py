"""Scores under a sampler against the sampling that they describe: python benchmarks/sampler_scores.py

Texts are sampled (temperature 1, order by top probability, prompt 64, answer 128, blocks of 32) and then scored by
`--estimator=sampler` with the same settings, alternately in one process after one run of each to compile. Asserted in
every pair: both go through each text in the same steps, and a text has the same score each time. Prints medians and
ranges of seconds, and of scoring over sampling, which is to be 1.2 at most. Weights are random, which changes no speed
here.
"""

import argparse

import inference_shapes
import numpy as np
import record
import timing

from llada.inference import likelihood, orders, sampler
from llada.inference.settings import SamplerConfig
from llada.model import cached

PROMPT, ANSWER, BLOCK = 64, 128, 32


def programs(shape: str, steps: int, batch: int):
    """Functions that sample and that score, and one that raises where they do not belong together."""
    config, params, special = inference_shapes.build(shape)
    prompt_BP = np.random.default_rng(1).integers(0, special.mask, (batch, PROMPT)).astype(np.int32)
    canvas_BL = np.concatenate([prompt_BP, np.full((batch, ANSWER), special.mask, np.int32)], axis=1)
    forbidden_V = np.zeros(config.vocab_size, bool)
    order = SamplerConfig(steps=steps, block_length=BLOCK, temperature=1.0, remasking=orders.REMASKING)

    def sample():
        return sampler.reverse_process(config, params, canvas_BL, order, special, forbidden_V)

    drawn = sample()
    pairs = [likelihood.Pair(text[:PROMPT].tolist(), text[PROMPT:].tolist()) for text in drawn.tokens_BL]
    settings = likelihood.LikelihoodConfig(
        estimator="sampler", steps=steps, block_length=BLOCK, batch_tokens=canvas_BL.size
    )

    def score():
        found = likelihood.log_likelihoods(config, params, pairs, special, settings, forbidden_V=forbidden_V)
        return [each.log_likelihood for each in found]

    scored, _ = orders.order_for(ANSWER, steps, BLOCK, 1.0, 0.0, None, among_all=False)
    forbidden_F, open_BL = np.array([special.mask]), canvas_BL == special.mask
    unstacked = cached.for_decoding(params)
    at = orders.scored(config, special, forbidden_F, scored, unstacked, drawn.tokens_BL, open_BL, None)
    expected = np.asarray(at[0]).sum(axis=1)

    def same(a, b):
        np.testing.assert_array_equal(a.tokens_BL, drawn.tokens_BL)
        np.testing.assert_array_equal(a.step_BL, np.asarray(at[1]))
        np.testing.assert_allclose(b, expected, rtol=1e-5)
        return {"forward_passes": a.forward_passes, "nats_per_token": -float(np.mean(b)) / ANSWER}

    return sample, score, same


def row(facts: dict) -> dict[str, str]:
    """What docs/benchmarks.md shows of them."""
    return {
        "shape": facts["shape"],
        "texts": str(facts["batch"]),
        "tokens a step": str(ANSWER // facts["steps"]),
        "sampling, s": timing.text(facts["ours"]),
        "scoring, s": timing.text(facts["scoring"]),
        "scoring / sampling": timing.text(facts["ratio"]),
    }


def main() -> None:
    """Print a line of JSON for each number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[128, 32])
    parser.add_argument("--shape", choices=inference_shapes.SHAPES, default="20m")
    parser.add_argument("--batch", type=int, default=4, help="texts sampled, and scored, together")
    parser.add_argument("--pairs", type=int, default=5)
    record.add_flags(parser)
    options = parser.parse_args()
    rows = []
    for steps in options.steps:
        facts = dict(shape=options.shape, steps=steps, batch=options.batch, pairs=options.pairs)
        measured = timing.alternate(*programs(options.shape, steps, options.batch), options.pairs, rival="scoring")
        facts |= measured
        timing.report(**facts)
        rows.append(row(facts))
    record.record(options, "sampler_scores", rows)


if __name__ == "__main__":
    main()
