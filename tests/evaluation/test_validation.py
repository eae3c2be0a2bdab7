"""Errors of the held-out figure: what draws add, told apart from what rows add."""

import dataclasses

import jax
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.config import MeshConfig
from llada.evaluation.validation import Validator, stratified_variance
from llada.training import workdir as workdir_lib


def test_the_variance_of_a_stratified_mean_is_right_where_strata_are_alike_and_never_too_small():
    """Values of stratum m: f(u) + noise, u uniform in the m-th of M slices, all shifted by one number per row."""
    rng = np.random.default_rng(0)
    M, rows = 4, 200_000
    u_MB = (rng.uniform(size=rows) + np.arange(M)[:, None] / M) % 1.0
    for slope, noise in ((0.0, 1.0), (1.0, 1.0), (3.0, 0.1)):
        values_MB = slope * u_MB + noise * rng.normal(size=(M, rows))
        estimate = float(np.mean(stratified_variance(jax.numpy.asarray(values_MB))))
        true = values_MB.mean(axis=0).var()
        if slope == 0:
            assert estimate == pytest.approx(true, rel=0.02)
        assert estimate > 0.98 * true
    assert np.isnan(stratified_variance(jax.numpy.ones((1, 3)))).all()


@pytest.fixture(scope="module")
def opened(trained):
    return {family: workdir_lib.load(run.workdir, mesh=MeshConfig()) for family, run in trained.items()}


def figure(opened, workdir, draws: int, mesh):
    config = dataclasses.replace(opened.config, evaluate=dataclasses.replace(opened.config.evaluate, draws=draws))
    corpus = workdir_lib.corpus_for(workdir, config, opened.tokenizer)
    tokenizer = opened.tokenizer
    with jax.set_mesh(mesh):
        validator = Validator(config, tokenizer.special, tokenizer.token_bytes_V, corpus.holdout_NL, mesh)
        return validator(opened.params), validator.rows_digest


def test_the_monte_carlo_error_covers_what_more_draws_would_change(trained, opened):
    """The figure of few draws lies within three of its own errors of that of many; the error falls with draws."""
    mesh = mesh_lib.make(MeshConfig())
    few, digest = figure(opened["llada"], trained["llada"].workdir, 4, mesh)
    many, _ = figure(opened["llada"], trained["llada"].workdir, 256, mesh)
    assert 0 < many.monte_carlo_stderr < few.monte_carlo_stderr / 4
    assert abs(few.nats_per_token - many.nats_per_token) < 3 * few.monte_carlo_stderr
    exact, same = figure(opened["arm"], trained["arm"].workdir, 4, mesh)
    assert exact.monte_carlo_stderr == 0 and same == digest  # both families are read on the same rows
    assert digest == trained["llada"].summary["eval_rows_digest"] == trained["arm"].summary["eval_rows_digest"]
