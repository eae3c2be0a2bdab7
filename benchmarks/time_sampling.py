"""Variance of the diffusion loss and of its gradient with iid and with stratified times, on a trained model.

python benchmarks/time_sampling.py --workdir=runs/quickstart/llada

The same batches meet many draws of (t, masks); what varies is the noise of the objective alone. Prints one line a batch
size: variance of the batch loss and trace of the gradient's covariance, as ratios stratified / iid (medians and
quartiles over batches), and asserts that the two mean losses agree.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import llada
from llada.model import transformer
from llada.objectives import diffusion
from llada.objectives.noise import Noise
from llada.training import workdir as workdir_lib

WORKDIR = flags.DEFINE_string("workdir", None, "a trained LLaDA", required=True)
BATCHES = flags.DEFINE_integer("batches", 8, "different batches per batch size")
DRAWS = flags.DEFINE_integer("draws", 32, "draws of the noise per batch")


def measure(run, tokens_BL, sampling: str, first_step: int) -> tuple[np.ndarray, float]:
    """Losses of DRAWS draws of the noise on one batch, and the trace of the gradient's covariance over them."""
    B = len(tokens_BL)
    objective = dataclasses.replace(run.config.objective, time_sampling=sampling, random_length_fraction=0.0)

    @jax.jit
    def one(params, step):
        def loss(params):
            predict = functools.partial(transformer.hidden, run.config.model, params)
            head_VD = transformer.head(run.config.model, params)
            noise = Noise(0, step, jnp.arange(B), B)
            terms = diffusion.loss(predict, head_VD, jnp.asarray(tokens_BL), noise, run.special, objective)
            return terms.nats / terms.token_count

        return jax.value_and_grad(loss)(params)

    losses, total, squares = [], None, 0.0
    for draw in range(DRAWS.value):
        value, gradient = one(run.params, first_step + draw)
        losses.append(float(value))
        squares += float(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    n = DRAWS.value
    mean_square = float(sum(jnp.sum((g / n) ** 2) for g in jax.tree.leaves(total)))
    return np.array(losses), (squares / n - mean_square) * n / (n - 1)


def main(_):
    """Measure and print."""
    run = llada.load(WORKDIR.value)
    corpus = workdir_lib.corpus_for(Path(WORKDIR.value), run.config, run.tokenizer)
    for B in (4, 8, 16, 32):
        loss_ratios, gradient_ratios, means = [], [], {"iid": [], "stratified": []}
        for batch in range(BATCHES.value):
            tokens_BL = np.asarray(corpus.train_NL[batch * B : (batch + 1) * B], np.int32)
            found = {kind: measure(run, tokens_BL, kind, 1000 * batch) for kind in means}
            for kind, (losses, _) in found.items():
                means[kind].append(losses.mean())
            loss_ratios.append(found["stratified"][0].var(ddof=1) / found["iid"][0].var(ddof=1))
            gradient_ratios.append(found["stratified"][1] / found["iid"][1])
        gap = np.array(means["stratified"]) - np.array(means["iid"])
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        assert abs(gap.mean()) < 5 * error, "stratified and iid times disagree on the loss"
        record = {"batch_size": B, "tokens_per_sequence": run.config.data.sequence_length}
        for name, ratios in (("loss_variance_ratio", loss_ratios), ("gradient_variance_ratio", gradient_ratios)):
            record[name] = round(float(np.median(ratios)), 3)
            record[f"{name}_quartiles"] = [round(float(q), 3) for q in np.percentile(ratios, [25, 75])]
        print(json.dumps(record | {"batches": BATCHES.value, "draws": DRAWS.value}), flush=True)


if __name__ == "__main__":
    app.run(main)
