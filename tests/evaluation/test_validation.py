"""The held-out figure: of which rows, with which errors (what draws add, told apart from what rows add), in parts."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada import json_files
from llada import mesh as mesh_lib
from llada.config import MeshConfig
from llada.errors import DataError, UserError
from llada.evaluation import validation
from llada.evaluation.validation import Validator
from llada.objectives import diffusion
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens
from llada.objectives.estimates import stratified_variance
from llada.training import corpus as corpus_lib
from llada.training import run as run_lib


def test_the_variance_of_a_stratified_mean_is_right_where_strata_are_alike_and_never_too_small():
    """Values of stratum m: f(u) + noise, u uniform in the m-th of M slices, all shifted by one number per row."""
    rng = np.random.default_rng(0)
    M, rows = 4, 200_000
    u_MB = (rng.uniform(size=rows) + np.arange(M)[:, None] / M) % 1.0
    for slope, noise in ((0.0, 1.0), (1.0, 1.0), (3.0, 0.1)):
        values_MB = slope * u_MB + noise * rng.normal(size=(M, rows))
        estimate = float(np.mean(stratified_variance(jax.numpy.asarray(values_MB), circular=True)))
        true = values_MB.mean(axis=0).var()
        if slope == 0:
            assert estimate == pytest.approx(true, rel=0.02)
        assert estimate > 0.98 * true
    assert np.isnan(stratified_variance(jax.numpy.ones((1, 3)), circular=True)).all()


@pytest.fixture(scope="module")
def opened(trained):
    return {family: run_lib.load(run.workdir, mesh=MeshConfig()) for family, run in trained.items()}


def figure(opened, workdir, draws: int, mesh):
    config = dataclasses.replace(opened.config, evaluate=dataclasses.replace(opened.config.evaluate, draws=draws))
    corpus = corpus_lib.corpus_for(workdir, config, opened.tokenizer)
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


def with_values(config, **groups):
    """The config with other values: `with_values(config, train={"microbatches": 2})`."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_figures_are_those_of_each_row_once(trained, opened, microbatches):
    """Five rows, four or two at a time, so that the last batch is filled up; against all logits of the ARM.

    The tokenizer of an ARM needs no mask token.
    """
    run, mesh = opened["arm"], mesh_lib.make(MeshConfig())
    rows_RL = corpus_lib.corpus_for(trained["arm"].workdir, run.config, run.tokenizer).holdout_NL[:5]
    config = with_values(run.config, train={"batch_size": 4, "microbatches": microbatches}, evaluate={"batches": 2})
    bytes_V = run.tokenizer.token_bytes_V
    with jax.set_mesh(mesh):
        validator = Validator(config, SpecialTokens(None, run.tokenizer.special.eos), bytes_V, rows_RL, mesh)
        found = validator(run.params)
        log_p = jax.nn.log_softmax(run.logits(shift_right(jnp.asarray(rows_RL, jnp.int32), run.tokenizer.special.eos)))
    nats_RL = -np.take_along_axis(np.asarray(log_p, np.float64), rows_RL[..., None].astype(int), axis=-1)[..., 0]
    R, L = rows_RL.shape
    assert validator.batch == 4 // microbatches
    assert (found.rows, found.tokens, found.draws, found.kind, found.estimator) == (R, R * L, 1, "NLL", "exact")
    assert found.nats_per_token == pytest.approx(nats_RL.mean(), rel=1e-5)
    assert found.stderr == pytest.approx(nats_RL.sum(axis=1).std(ddof=1) / math.sqrt(R) / L, rel=1e-4)
    text_bytes = sum(int(bytes_V[i]) for row_L in rows_RL for i in row_L)
    assert found.bits_per_byte * text_bytes * math.log(2) == pytest.approx(nats_RL.sum(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats_RL.mean()), rel=1e-5)
    assert found.eval_rows_digest == validator.rows_digest


def test_rows_are_spread_over_the_whole_side_on_any_mesh_in_any_parts(tiny):
    """Shapes only: the same rows whatever goes through the model at once."""
    mesh = mesh_lib.make(MeshConfig())
    side_NL = np.arange(22 * 32).reshape(22, 32) % 300
    rows = []
    for microbatches in (1, 4):
        config = with_values(tiny("llada"), train={"microbatches": microbatches})
        for devices in (mesh, SimpleNamespace(shape={"data": 3, "fsdp": 2, "tensor": 1})):
            made = object.__new__(Validator)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(validation, "jitted", lambda *given: None)
                made.__init__(config, SpecialTokens(3, 1), np.ones(300), side_NL, devices)
            rows.append(made.rows)
            assert made.bytes == 16 * 32  # of the rows that are read
    for found in rows:
        np.testing.assert_array_equal(found, side_NL[[0, 1, 2, 4, 5, 7, 8, 9, 11, 12, 14, 15, 16, 18, 19, 21]])
    four = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2})
    assert [mesh_lib.local_batch(n, four) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(UserError, match="2 sequences, not a multiple of mesh data x fsdp = 4"):
        mesh_lib.check(with_values(config, train={"batch_size": 8, "microbatches": 4}), four)
    assert [validation.rows_at_once(config, four, rows) for rows in (100, 1)] == [4, 4]
    assert validation.rows_at_once(with_values(config, train={"microbatches": 64}), mesh, 100) == 1
    with pytest.raises(DataError, match="id 301, and the tokenizer 300"):
        Validator(config, SpecialTokens(3, 1), np.ones(300), side_NL + 2, mesh)
    with pytest.raises(DataError, match="no held-out rows"):
        Validator(config, SpecialTokens(3, 1), np.ones(300), side_NL[:0], mesh)


def test_the_error_of_draws_is_that_of_the_mean_over_rows(tiny, monkeypatch):
    """Three rows whose nats and variances are told, two at a time."""
    told = np.array([10.0, 20.0, 60.0]), np.array([1.0, 4.0, 9.0])
    monkeypatch.setattr(validation, "jitted", lambda *_: lambda params, rows, i: [values[i % 3] for values in told])
    config, mesh = with_values(tiny("llada"), train={"batch_size": 2}), mesh_lib.make(MeshConfig())
    found = Validator(config, SpecialTokens(3, 1), np.full(300, 2), np.zeros((3, 32), np.int32), mesh)(None)
    assert found.nats_per_token == pytest.approx(30 / 32)
    assert found.monte_carlo_stderr == pytest.approx(math.sqrt(14) / 3 / 32)
    assert found.bits_per_byte == pytest.approx(90 / math.log(2) / (3 * 32 * 2))
    assert (found.kind, found.estimator, found.draws) == ("bound", "l_of_L", config.evaluate.draws)
    assert config.evaluate.draws > 1 and validation.estimator_for(config, "bernoulli") == "bernoulli"


def test_draws_take_equal_slices_and_each_has_masks_of_its_own(monkeypatch):
    """What each draw of three rows is made from: u, and the sum of the uniform numbers of its tokens."""

    def drawn(told) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(diffusion, "corrupt", lambda x0, u, uniform, *_: SimpleNamespace(weight_B=told(u, uniform)))
            patch.setattr(diffusion, "bound_terms", lambda *_: (0.0, jnp.ones((3, 1))))
            rows = jnp.ones((3, 8), jnp.int32), jnp.array([0, 5, 6])
            return np.asarray(
                jax.jit(lambda: diffusion.held_out_nats(None, None, *rows, SpecialTokens(3, 2), 4, "l_of_L", None))()
            )

    u_MB, sum_MB = drawn(lambda u, uniform: u), drawn(lambda u, uniform: jnp.sum(uniform, axis=1))
    np.testing.assert_allclose((u_MB - u_MB[0]) % 1.0, np.arange(4)[:, None] / 4 * np.ones(3), atol=1e-6)
    assert len(np.unique(u_MB[0])) == 3 and len(np.unique(sum_MB)) == 12


def test_numbers_that_do_not_exist_are_null():
    assert validation.perplexity(709.0) < math.inf and validation.perplexity(711.0) == math.inf
    assert math.isnan(validation.perplexity(math.nan))
    assert (
        json_files.dumps([validation.perplexity(1e4), float(stratified_variance(jnp.ones((1, 1)), circular=True)[0])])
        == "[null, null]"
    )


def test_the_command_prints_before_it_keeps(trained, tmp_path, monkeypatch):
    """Fewer rows than asked for are said; a disk that takes nothing costs the file, not the figures."""
    workdir = tmp_path / "arm"
    shutil.copytree(trained["arm"].workdir, workdir)

    def full(path, content):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("llada.commands.evaluate.write_atomically", full)
    done = in_process.llada("evaluate", f"--workdir={workdir}", "--batches=10000", "--draws=1", "--microbatches=2")
    assert done.returncode == 0
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))
    assert {"rows", "draws", "eval_rows_digest", "estimator", "kind", "dtype", "step"} <= found.keys()
    few, kept = done.stderr.strip().splitlines()
    assert f"are 80,000 rows; the held-out side has {found['rows']:,}" in few
    assert "evaluation.json could not be saved: Read-only file system" in kept


MISTAKES = {
    "--config.mesh.tensor=2": "mesh.tensor=2 does not make the 1 device(s)",
    "--config.mesh.fdsp=2": "did you mean --config.mesh.fsdp?",
    "--config.train.microbatches=2": "--config.train.microbatches belongs to llada train",
    "--config=quickstart.py": "--config=quickstart.py belongs to llada train",
    "--dtype=float16": "float32|bfloat16",
    "--estimator=bernoulli": "this ARM's likelihood is exact",
    "--processes=2": "--coordinator and --process_id missing",
    "--microbatches=0": "--microbatches",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_what_cannot_be_opened_is_refused_in_one_line(trained, flag):
    done = in_process.llada("evaluate", f"--workdir={trained['arm'].workdir}", flag)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert MISTAKES[flag] in line
