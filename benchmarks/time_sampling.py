"""How evenly are times dealt over devices, and how much of the loss's variance do stratified ones remove?

python benchmarks/time_sampling.py [--workdir=runs/quickstart/llada]

A device's work in the vocabulary head and the end of the last layer is in proportion to the rows that it masks, and all
devices wait for the busiest: the first lines are its rows over the mean device's, on average over 200 steps. The last
line takes a trained model.

One draw of a row's loss (nats per token, Eq. (3)) varies because of t and, given t, because of the masks. Stratifying t
over a batch removes the first part and leaves the second, so the batch loss keeps the share
within / (within + between) of its variance under iid times. Both parts are estimated from draws in slices of t; the
interval is a bootstrap over rows. The mask part falls as 1/L, from which the last figure projects to rows of 4,096.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import llada
from llada.errors import UserError
from llada.model import transformer
from llada.objectives import diffusion, noise
from llada.training import workdir as workdir_lib

WORKDIR = flags.DEFINE_string("workdir", None, "a trained LLaDA")
ROWS = flags.DEFINE_integer("rows", 64, "held-out rows")
SLICES = flags.DEFINE_integer("slices", 16, "slices of t in [0, 1)")
DRAWS = flags.DEFINE_integer("draws", 32, "draws of (t, masks) per row and slice")


STEPS = 200
LOADS = ((128, 1, 10), (256, 1, 5), (256, 1, 4), (64, 10, 2), (256, 5, 1))  # devices, microbatches, sequences at once


def busiest_over_mean(devices: int, microbatches: int, sequences: int) -> dict[str, float]:
    """By how times are sampled; in the limit of long rows a device masks the mean of its times."""
    n = devices * microbatches * sequences
    of_steps = {
        how: jax.vmap(lambda step, how=how: noise.times(noise.Noise(0, step, jnp.arange(n), n), how))(jnp.arange(STEPS))
        for how in ("stratified", "iid")
    }
    of_steps["a draw for each sequence"] = np.random.default_rng(0).random((STEPS, n))
    parts = {how: np.asarray(t).reshape(STEPS, devices, microbatches, -1).mean(axis=3) for how, t in of_steps.items()}
    # Devices meet after every microbatch.
    return {
        how: round(float(np.mean(part.max(axis=1).sum(axis=-1) / part.mean(axis=1).sum(axis=-1))), 3)
        for how, part in parts.items()
    }


def draws_of_the_loss(run, x0_RL) -> np.ndarray:
    """(slices, draws, rows) nats per token."""
    R, L = x0_RL.shape
    objective = run.config.objective
    predict = functools.partial(transformer.hidden, run.config.model, run.params)
    head_VD = transformer.head(run.config.model, run.params)

    @jax.jit
    def draw(index):
        time_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
        t_R = (index // DRAWS.value + jax.random.uniform(time_key, (R,))) / SLICES.value
        uniform_RL = jax.random.uniform(mask_key, (R, L))
        corruption = diffusion.forward_process(
            x0_RL, t_R, uniform_RL, jnp.ones(x0_RL.shape, bool), run.tokenizer.mask_id, objective.eps
        )
        _, nats_RL = diffusion.bound_terms(predict, head_VD, x0_RL, None, corruption, objective.head_rows)
        return corruption.weight_B * jnp.sum(nats_RL, axis=1) / L

    losses = [np.asarray(draw(index)) for index in range(SLICES.value * DRAWS.value)]
    return np.array(losses, np.float64).reshape(SLICES.value, DRAWS.value, R)


def parts(losses_SKR: np.ndarray) -> tuple[float, float]:
    """Variance within slices (masks) and between them (t), each averaged over rows, nats^2 per token^2."""
    S, K, _ = losses_SKR.shape
    within = losses_SKR.var(axis=1, ddof=1).mean()
    # The spread of slice means contains 1/K of the variance within; ddof=0 because t is uniform over these S slices.
    between = losses_SKR.mean(axis=1).var(axis=0).mean() - within / K * (S - 1) / S
    return float(within), float(between)


def main():
    """Measure and print lines of JSON."""
    for load in LOADS:
        named = dict(zip(("devices", "microbatches", "sequences_at_once"), load, strict=True))
        print(json.dumps(named | {"busiest_over_mean": busiest_over_mean(*load)}), flush=True)
    if WORKDIR.value is None:
        return
    run = llada.load(WORKDIR.value)
    corpus = workdir_lib.corpus_for(Path(WORKDIR.value), run.config, run.tokenizer)
    picked = np.linspace(0, len(corpus.holdout_NL) - 1, ROWS.value).astype(int)
    losses = draws_of_the_loss(run, jnp.asarray(corpus.holdout_NL[picked], jnp.int32))
    within, between = parts(losses)
    rng = np.random.default_rng(0)
    resampled = [parts(losses[:, :, rng.integers(0, ROWS.value, ROWS.value)]) for _ in range(200)]
    ratios = [w / (w + b) for w, b in resampled]
    L = run.config.data.sequence_length
    projected = within * L / 4096
    record = {
        "tokens_per_row": L,
        "nats_per_token": round(float(losses.mean()), 3),
        "variance_by_masks": round(within, 3),
        "variance_by_t": round(between, 3),
        "stratified_over_iid": round(within / (within + between), 3),
        "interval_90": [round(float(q), 3) for q in np.percentile(ratios, [5, 95])],
        "projected_to_4096_tokens": round(projected / (projected + between), 3),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    flags.FLAGS(sys.argv)
    try:
        main()
    except UserError as mistake:
        print(f"time_sampling: {mistake}", file=sys.stderr)
        sys.exit(2)
