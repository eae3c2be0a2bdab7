"""Held-out figures by chain rules and samplers: of which texts, equal to the model's own laws, and side by side."""

import dataclasses
import json
import math
import shutil

import in_process
import jax
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.config import MeshConfig
from llada.evaluation import likelihoods
from llada.evaluation.validation import Validator
from llada.inference.likelihood import LikelihoodConfig
from llada.objectives.contract import ANSWER, CONTEXT, PADDING, Examples, SpecialTokens
from llada.training import corpus as corpus_lib
from llada.training import run as run_lib

ROWS = 3


@pytest.fixture(scope="module")
def opened(trained):
    return run_lib.load(trained["llada"].workdir, mesh=MeshConfig())


@pytest.fixture(scope="module")
def side_NL(trained, opened):
    return corpus_lib.corpus_for(trained["llada"].workdir, opened.config, opened.tokenizer).holdout_NL[:60]


def figure(opened, side_NL, rows=ROWS, **settings):
    mesh, special = mesh_lib.make(MeshConfig()), opened.tokenizer.special
    with jax.set_mesh(mesh):
        scorer = likelihoods.scorer(opened.config, special, LikelihoodConfig(**settings), None)
        bytes_V = opened.tokenizer.token_bytes_V
        validator = Validator(opened.config, special, bytes_V, side_NL, mesh, rows=rows, scorer=scorer)
        return validator(opened.params), validator


@pytest.mark.parametrize("estimator", ["chain_rule", "chain_rule_reversed"])
def test_a_chain_rule_of_held_out_rows_is_the_sum_of_its_steps(opened, side_NL, estimator):
    """Three rows of 32 tokens, each step's canvas made by hand; the error is the spread of rows."""
    found, validator = figure(opened, side_NL, estimator=estimator)
    L = side_NL.shape[1]
    np.testing.assert_array_equal(validator.rows, side_NL[[0, 29, 59]])
    i, j = np.arange(L)[:, None], np.arange(L)[None, :]
    masked_LL = j >= i if estimator == "chain_rule" else j <= i
    nats = []
    for row_L in validator.rows:
        canvas_LL = np.where(masked_LL, opened.tokenizer.mask_id, row_L[None]).astype(np.int32)
        log_p = np.asarray(jax.nn.log_softmax(opened.logits(canvas_LL)), np.float64)
        nats.append(-sum(log_p[i, i, row_L[i]] for i in range(L)))
    assert found.nats_per_token == pytest.approx(np.mean(nats) / L, rel=1e-5)
    assert found.stderr == pytest.approx(np.std(nats, ddof=1) / math.sqrt(ROWS) / L, rel=1e-3)
    assert (found.kind, found.draws, found.monte_carlo_stderr) == ("exact in its order", 0, 0.0)
    assert (found.rows, found.tokens) == (ROWS, ROWS * L)


def test_what_is_scored_of_documents_and_of_examples(opened):
    """Documents that do not see each other are texts of their own; of an example the answer with its padding."""
    special = SpecialTokens(mask=3, eos=1)
    rows_NL = np.array([[5, 6, 1, 7, 8, 1, 9, 4], [5, 6, 7, 8, 9, 4, 5, 6]], np.int32)
    pairs, row_P = likelihoods.pairs_of(opened.config, special, rows_NL)
    assert [(p.prompt, p.answer) for p in pairs] == [([], rows_NL[0].tolist()), ([], rows_NL[1].tolist())]
    blocked = dataclasses.replace(opened.config.objective, block_cross_document_attention=True)
    pairs, row_P = likelihoods.pairs_of(dataclasses.replace(opened.config, objective=blocked), special, rows_NL)
    assert [p.answer for p in pairs] == [[5, 6, 1], [7, 8, 1], [9, 4], rows_NL[1].tolist()]
    assert row_P.tolist() == [0, 0, 0, 1] and len({p.salt for p in pairs}) == 4
    role_NL = np.array([[CONTEXT, CONTEXT, ANSWER, ANSWER, PADDING, CONTEXT]], np.int32)
    examples = Examples(np.array([[5, 6, 7, 8, 1, 0]], np.int32), np.array([[1, 1, 1, 1, 1, 0]], np.int32), role_NL)
    (pair,), row_P = likelihoods.pairs_of(opened.config, special, examples)
    assert (pair.prompt, pair.answer, row_P.tolist()) == ([5, 6], [7, 8, 1], [0])


def test_pieces_of_the_work_change_nothing_but_the_progress(opened, side_NL, monkeypatch):
    whole, _ = figure(opened, side_NL, estimator="upper", draws=2)
    monkeypatch.setattr(likelihoods, "_MOST_BYTES", 1)
    pieces, validator = figure(opened, side_NL, estimator="upper", draws=2)
    assert pieces[:3] == pytest.approx(whole[:3], nan_ok=True, rel=1e-4) and pieces.kind == "bound from below"
    calls = []
    with jax.set_mesh(validator.mesh):
        validator(opened.params, lambda *call: calls.append(call))
    assert calls == sorted(set(calls)) and calls[-1][0] == calls[-1][1]


def llada(*words):
    done = in_process.llada(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_the_gap_is_told_by_each_measure_and_which_is_what(trained, tmp_path):
    """Two measures of four rows beside training's bound; the ARM's exact figure of the same rows."""
    places = {name: tmp_path / name for name in trained}
    for name, place in places.items():
        shutil.copytree(trained[name].workdir, place)
    of_llada = ("evaluate", f"--workdir={places['llada']}", "--rows=4")
    sampler = ("--estimator=sampler", "--steps=16", "--block_length=8")
    found = [json.loads(llada(*of_llada, *more).stdout) for more in (["--estimator=chain_rule"], sampler)]
    again = json.loads(llada(*of_llada, *sampler).stdout)
    assert again == found[1] and again["sampler"]["steps"] == 16
    assert [f["kind"] for f in found] == ["exact in its order", "exact under its sampler"]
    kept = json.loads((places["llada"] / "evaluation.json").read_text())
    assert kept["estimator"] == "sampler" and [e["estimator"] for e in kept["earlier"]] == ["chain_rule"]

    compared = ("compare", f"--llada={places['llada']}", f"--arm={places['arm']}", f"--out={tmp_path}/out")
    texts = ("--prompt=the cat", "--infill=the [MASK]", "--gen_length=4")
    refused = in_process.llada(*compared, "--estimator=sampler", *texts)
    assert refused.returncode == 2 and f"--workdir={places['arm']} --rows=4" in refused.stderr
    exact = json.loads(llada("evaluate", f"--workdir={places['arm']}", "--rows=4").stdout)
    assert exact["eval_rows_digest"] == found[0]["eval_rows_digest"]
    llada(*compared, *texts)
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    told = [line.split("|")[1:-1] for line in lines if "at most this" in line or "exact on both sides" in line]
    told = [[cell.strip() for cell in line] for line in told]
    bound = [line for line in told if line[3] == "a bound on its NLL from above"]
    assert len(bound) == 1 and bound[0][6] == "the true gap is at most this"
    by_name = {line[1].split(" ")[0]: line for line in told}
    for of in found:
        line = by_name[of["estimator"]]
        assert float(line[5]) == pytest.approx(of["nats_per_token"] - exact["nats_per_token"], abs=1e-4)
        assert line[2].startswith(f"{of['nats_per_token']:.4f}") and line[7] == "4"
        assert line[3].startswith("exact, of this") and line[6] == "exact on both sides"
    # The bound of the table is still training's: the latest evaluation is none of it.
    assert any(f"{trained['llada'].summary['eval_nats_per_token']:.4f}" in line for line in lines)
    missing = in_process.llada(*compared, "--estimator=upper", *texts)
    assert missing.returncode == 2 and "--estimator=upper" in missing.stderr


MISTAKES = {
    ("--estimator=sampler", "--steps=5", "--block_length=8"): "--steps=5 must be a positive multiple of the 4 block",
    ("--estimator=sampler", "--temperature=0"): "--temperature=0.0: --estimator=sampler is the probability of draws",
    ("--estimator=sampler", "--remasking=random"): "--remasking is not for --estimator=sampler, whose order",
    ("--estimator=chain_rule", "--steps=4"): "--steps says how answers are written",
    ("--estimator=chain_rule", "--draws=4"): "--draws=4: --estimator=chain_rule draws nothing",
    ("--estimator=likelihood",): "--estimator=likelihood is not one of l_of_L, bernoulli, chain_rule",
    ("--rows=4", "--batches=1"): "--rows=4 and --batches=1 exclude each other",
    ("--rows=0",): "--rows",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_what_cannot_be_measured_is_refused_in_one_line(trained, flags):
    done = in_process.llada("evaluate", f"--workdir={trained['llada'].workdir}", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert MISTAKES[flags] in done.stderr.strip().splitlines()[-1]


def test_an_arm_has_no_orders(trained):
    done = in_process.llada("evaluate", f"--workdir={trained['arm'].workdir}", "--estimator=sampler")
    assert done.returncode == 2 and "this ARM's likelihood is exact" in done.stderr
