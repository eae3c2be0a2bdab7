"""Sampling and likelihood against the published PyTorch loops on the same weights: python benchmarks/inference_speed.py

  sampler     the exact sampler against LLaDA's loop: prompt 64, answer 128, blocks of 32, one token a step
  dual        dual cache and confidence threshold against Fast-dLLM's algorithm
  likelihood  128 draws of a 16-token answer in 128 tokens, against LLaDA's Monte Carlo loop on the same masks
  lm_eval     log-likelihoods of --requests multiple-choice requests as `llada lm_eval` computes them, against the loop
              of LLaDA's lm-eval adapter: request by request, 128 draws each, 8 rows a pass; not run unless named

Both programs run alternately in one process, after one run each to compile and warm up; every pair asserts that the
tokens (or the likelihood) are the same. Prints medians and ranges of seconds and of the ratio per pair. Weights are
random, which changes the speed of `dual` alone: there the vocabulary matrix is scaled so that about half of the
confidences pass the threshold. Needs torch.
"""

import argparse
import functools
import os

import inference_shapes
import numpy as np
import record
import timing
import torch
import torch_reference

from llada.inference import likelihood, mask_plans, sampler
from llada.inference.settings import SamplerConfig


def build(name: str, head_scale: float = 1.0):
    """`(config, parameters, PyTorch model, special tokens)` with random weights."""
    config, params, special = inference_shapes.build(name, head_scale)
    return config, params, torch_reference.from_jax(config, params), special


def sampling(shape: str, dual: bool, batch: int = 1):
    """Two functions that return (tokens, forward passes)."""
    config, params, model, special = build(shape, head_scale=4.0 if dual else 1.0)
    prompt = np.random.default_rng(1).integers(0, special.mask, (batch, 64)).astype(np.int32)
    canvas_BL = np.concatenate([prompt, np.full((batch, 128), special.mask, np.int32)], axis=1)
    forbidden_V = np.zeros(config.vocab_size, bool)  # the published loops do not forbid the mask token either
    cached = dict(cache="dual", confidence_threshold=0.5) if dual else {}
    settings = SamplerConfig(steps=128, block_length=32, **cached)
    common = dict(steps=128, gen_length=128, block_length=32, mask_id=special.mask)

    def ours():
        sample = sampler.reverse_process(config, params, canvas_BL, settings, special, forbidden_V)
        return sample.tokens_BL, sample.forward_passes

    def theirs():
        prompt_BL = torch.from_numpy(prompt).long()
        if dual:
            tokens, passes = torch_reference.generate_cached(model, prompt_BL, threshold=0.5, kind="dual", **common)
        else:
            tokens, passes = torch_reference.generate(model, prompt_BL, **common)
        return tokens.numpy(), passes

    def same(a, b):
        assert a[1] == b[1], f"{a[1]} and {b[1]} forward passes"
        np.testing.assert_array_equal(a[0], b[0])
        return {"forward_passes": a[1]}

    return ours, theirs, same


def scoring(shape: str):
    """Two functions that return log p(answer | prompt)."""
    config, params, model, special = build(shape)
    ids = np.random.default_rng(1).integers(0, special.mask, 128)
    pair = likelihood.Pair(ids[:112].tolist(), ids[112:].tolist())
    settings = likelihood.LikelihoodConfig(draws=128)
    masks_MA = mask_plans.draw_masks(pair, settings.estimator, settings.draws, special.mask_id)[0].copy()

    def ours():
        return likelihood.log_likelihoods(config, params, [pair], special, settings)[0].log_likelihood

    def theirs():
        return torch_reference.log_likelihood(
            model,
            torch.tensor(pair.prompt),
            torch.tensor(pair.answer),
            torch.from_numpy(masks_MA),
            mask_id=special.mask,
        )

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        return {"log_likelihood": a, "distinct_masks": len(np.unique(masks_MA, axis=0)), "draws": len(masks_MA)}

    return ours, theirs, same


def multiple_choice(shape: str, count: int):
    """Two functions that return log p of `count` answers, four to a question of 16 to 48 tokens, 1 to 12 tokens long.

    Where ours draws masks, the loop is given the same ones, repetitions included. Answers with fewer masks than draws
    ours enumerates; there the loop has 128 draws, and what ours gives is compared with the loop on all masks, untimed.
    """
    config, params, model, special = build(shape)
    rng = np.random.default_rng(1)
    settings = likelihood.LikelihoodConfig(draws=128)
    pairs = []
    for number in range(count):
        if number % 4 == 0:
            prompt = rng.integers(0, special.mask, rng.integers(16, 49)).tolist()
        pairs.append(likelihood.Pair(prompt, rng.integers(0, special.mask, rng.integers(1, 13)).tolist()))
    masks = [mask_plans.draw_masks(p, settings.estimator, settings.draws, special.mask_id)[0].copy() for p in pairs]
    plans = [mask_plans.make_plan(p, settings.estimator, settings.draws, special.mask_id) for p in pairs]

    def loop(pair, masks_MA, weights_M=None, batch_size=8):
        pieces = torch.tensor(pair.prompt), torch.tensor(pair.answer)
        masks_MA = torch.from_numpy(masks_MA)
        how = dict(mask_id=special.mask, batch_size=batch_size)
        return torch_reference.log_likelihood(model, *pieces, masks_MA, weights_M, **how)

    def ours():
        scores = likelihood.log_likelihoods(config, params, pairs, special, settings, full=True)
        return [score.log_likelihood for score in scores]

    def theirs():
        return [loop(pair, masks_MA) for pair, masks_MA in zip(pairs, masks, strict=True)]

    @functools.cache
    def exact():
        """Of the answers that ours enumerates, by their index."""
        enumerated = {i: plan for i, plan in enumerate(plans) if not plan.sampled}
        return {
            i: loop(pairs[i], plan.masked_RA, plan.weight_M * len(plan.weight_M), 64) for i, plan in enumerated.items()
        }

    def same(a, b):
        expected = [exact().get(i, value) for i, value in enumerate(b)]
        np.testing.assert_allclose(a, expected, rtol=1e-4)
        return {"requests": count, "enumerated": len(exact()), "rows": sum(len(plan.masked_RA) for plan in plans)}

    return ours, theirs, same


def row(facts: dict) -> dict[str, str]:
    """What docs/benchmarks.md shows of them."""
    return {
        "program": facts["benchmark"],
        "shape": facts["shape"],
        "ours, s": timing.text(facts["ours"]),
        "PyTorch, s": timing.text(facts["pytorch"]),
        "PyTorch / ours": timing.text(facts["ratio"]),
        "forward passes": str(facts.get("forward_passes", "")),
    }


def main() -> None:
    """Run what is named, or all, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["sampler", "dual", "likelihood"])
    parser.add_argument("--shape", choices=inference_shapes.SHAPES, default="20m")
    parser.add_argument("--batch", type=int, default=1, help="prompts sampled together; the published script has 3")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200, help="of lm_eval")
    record.add_flags(parser)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    programs = {
        "sampler": lambda: sampling(options.shape, dual=False, batch=options.batch),
        "dual": lambda: sampling(options.shape, dual=True),
        "likelihood": lambda: scoring(options.shape),
        "lm_eval": lambda: multiple_choice(options.shape, options.requests),
    }
    rows = []
    for name in options.which:
        facts = dict(benchmark=name, shape=options.shape, batch=options.batch, pairs=options.pairs)
        facts |= timing.alternate(*programs[name](), options.pairs)
        timing.report(**facts)
        rows.append(row(facts))
    record.record(options, "inference_speed", rows)


if __name__ == "__main__":
    main()
