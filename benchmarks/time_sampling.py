"""How evenly are times shared among devices, and how much of the loss's variance does stratifying them remove?

python benchmarks/time_sampling.py [--workdir=runs/quickstart/llada]

Without --workdir: a device's work in the vocabulary head and at the end of the last layer is proportional to the number
of rows that it masks, and all devices wait for the busiest. Its rows over the mean device's, averaged over 200 steps.

With a trained model: one draw of a row's loss (nats per token, Eq. (3)) varies because of t and, given t, because of
the masks. Stratifying t over a batch removes the first part and leaves the second, so the batch loss has
within / (within + between) of its variance under iid times. Both parts are estimated from draws in slices of t; the
interval is a bootstrap over rows. The mask part falls as 1/L, from which the last figure projects to rows of 4,096.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import record

import llada
from llada.errors import UserError
from llada.model import transformer
from llada.objectives import diffusion, noise
from llada.objectives.corruption import forward_process
from llada.training import corpus as corpus_lib

STEPS = 200
LOADS = ((128, 1, 10), (256, 1, 5), (256, 1, 4), (64, 10, 2), (256, 5, 1))  # devices, microbatches, sequences at once


def busiest_over_mean(devices: int, microbatches: int, sequences: int) -> dict[str, float]:
    """By how times are sampled; in the limit of long rows a device masks the mean of its times."""
    n = devices * microbatches * sequences
    times = {
        how: jax.vmap(lambda step, how=how: noise.times(noise.Noise(0, step, jnp.arange(n), n), how))(jnp.arange(STEPS))
        for how in ("stratified", "iid")
    }
    times["a draw for each sequence"] = np.random.default_rng(0).random((STEPS, n))
    loads = {how: np.asarray(t).reshape(STEPS, devices, microbatches, -1).mean(axis=3) for how, t in times.items()}
    # Devices meet after every microbatch.
    return {
        how: round(float(np.mean(load.max(axis=1).sum(axis=-1) / load.mean(axis=1).sum(axis=-1))), 3)
        for how, load in loads.items()
    }


def draws_of_the_loss(run, x0_RL, slices: int, draws: int) -> np.ndarray:
    """(slices, draws, rows) nats per token."""
    R, L = x0_RL.shape
    objective = run.config.objective
    predict = functools.partial(transformer.hidden, run.config.model, run.params)
    head_VD = transformer.head(run.config.model, run.params)

    @jax.jit
    def draw(index):
        time_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
        t_R = (index // draws + jax.random.uniform(time_key, (R,))) / slices
        uniform_RL = jax.random.uniform(mask_key, (R, L))
        corruption = forward_process(
            x0_RL, t_R, uniform_RL, jnp.ones(x0_RL.shape, bool), run.tokenizer.mask_id, objective.eps
        )
        _, nats_RL = diffusion.bound_terms(predict, head_VD, x0_RL, None, corruption, objective.head_rows)
        return corruption.weight_B * jnp.sum(nats_RL, axis=1) / L

    losses = [np.asarray(draw(index)) for index in range(slices * draws)]
    return np.array(losses, np.float64).reshape(slices, draws, R)


def variances(losses_SKR: np.ndarray) -> tuple[float, float]:
    """Variance within slices (masks) and between them (t), each averaged over rows, nats^2 per token^2."""
    S, K, _ = losses_SKR.shape
    within = losses_SKR.var(axis=1, ddof=1).mean()
    # The spread of slice means contains 1/K of the variance within; ddof=0 because t is uniform over these S slices.
    between = losses_SKR.mean(axis=1).var(axis=0).mean() - within / K * (S - 1) / S
    return float(within), float(between)


def of_a_model(options) -> dict:
    """The variance of a trained model's loss, by its causes."""
    run = llada.load(options.workdir)
    corpus = corpus_lib.corpus_for(options.workdir, run.config, run.tokenizer)
    picked = np.linspace(0, len(corpus.holdout_NL) - 1, options.rows).astype(int)
    x0_RL = jnp.asarray(corpus.holdout_NL[picked], jnp.int32)
    losses = draws_of_the_loss(run, x0_RL, options.slices, options.draws)
    within, between = variances(losses)
    rng = np.random.default_rng(0)
    resampled = [variances(losses[:, :, rng.integers(0, options.rows, options.rows)]) for _ in range(200)]
    ratios = [w / (w + b) for w, b in resampled]
    L = run.config.data.sequence_length
    projected = within * L / 4096
    return {
        "tokens_per_row": L,
        "nats_per_token": round(float(losses.mean()), 3),
        "variance_by_masks": round(within, 3),
        "variance_by_t": round(between, 3),
        "stratified_over_iid": round(within / (within + between), 3),
        "interval_90": [round(float(q), 3) for q in np.percentile(ratios, [5, 95])],
        "projected_to_4096_tokens": round(projected / (projected + between), 3),
    }


def main():
    """Print a line of JSON for each load, or one about the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="a trained LLaDA")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows")
    parser.add_argument("--slices", type=int, default=16, help="of t in [0, 1)")
    parser.add_argument("--draws", type=int, default=32, help="of (t, masks) for each row and slice")
    record.add_flags(parser)
    options = parser.parse_args()
    if options.workdir:
        facts = of_a_model(options)
        print(json.dumps(facts))
        record.record(options, "time_sampling_variance", [{name: f"{value}" for name, value in facts.items()}])
        return
    rows = []
    for load in LOADS:
        named = dict(zip(("devices", "microbatches", "sequences_at_once"), load, strict=True))
        ratios = busiest_over_mean(*load)
        print(json.dumps(named | {"busiest_over_mean": ratios}), flush=True)
        rows.append({name.replace("_", " "): f"{value}" for name, value in (named | ratios).items()})
    record.record(options, "time_sampling", rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        print(f"time_sampling: {mistake}", file=sys.stderr)
        sys.exit(2)
