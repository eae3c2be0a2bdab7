"""Every experiment file has exactly the parameters it claims, and its train step traces, with nothing allocated."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from llada import accounting
from llada.commands import experiment
from llada.model import transformer
from llada.objectives.contract import SpecialTokens
from llada.training import optimizer
from llada.training.step import init_state, train_step

FOLDER = Path(__file__).resolve().parents[1] / "experiments"

# total, non-embedding: LLaDA Table 5, recomputed (bias-free blocks, untied tables, norms counted).
COUNTS = {
    "llada_1b": (1_486_972_928, 968_976_384),
    "llada_8b": (8_015_581_184, 6_979_588_096),
    "arm_1b": (1_486_972_928, 968_976_384),
    "arm_7b": (6_834_851_840, 5_798_858_752),
    "llama3_8b": (8_028_164_096, 6_979_588_096),
}


def read(name, **overrides):
    return experiment.read(f"{FOLDER / name.partition(':')[0]}.py{name[len(name.partition(':')[0]) :]}", overrides)


@pytest.mark.parametrize("name", [*COUNTS, "quickstart:llada", "quickstart:best", "quickstart:arm"])
def test_parameter_counts_and_train_step(name):
    config = read(name)
    state = jax.eval_shape(functools.partial(init_state, config))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    tables = (1 if config.model.tie_embeddings else 2) * config.model.vocab_size * config.model.width
    assert (count, count - tables) == accounting.parameters(config.model)
    if name in COUNTS:
        assert (count, count - tables) == COUNTS[name]
    batch = jax.ShapeDtypeStruct((config.train.batch_size, config.data.sequence_length), np.int32)
    step = functools.partial(train_step, config=config, special=SpecialTokens(mask=3, eos=1))
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss_nats_per_token"].shape == ()


def test_the_files_are_all_tested():
    """isoflop in tests/scaling/test_grid.py; test_quickstart_sft.py, test_chitchat.py, test_objectives_study.py.

    reversal in test_reversal_study.py, in_context in test_in_context_study.py.
    """
    elsewhere = {"isoflop", "quickstart_sft", "instruction_tasks", "chitchat", "chitchat_data", "chitchat_report"}
    elsewhere |= {"objectives", "objectives_measure", "objectives_findings", "objectives_report"}
    elsewhere |= {"reversal", "reversal_data", "reversal_report"}
    elsewhere |= {"in_context", "in_context_data", "in_context_report"}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*COUNTS, "quickstart", "sft"} | elsewhere


def test_the_papers_odd_ffn_is_one_override_away():
    for name in ("llada_1b", "arm_1b"):
        config = read(name, **{"model.ffn": "5634"})
        assert accounting.parameters(config.model) == (1_487_243_264, 969_246_720)
    config = read("llama3_8b", **{"model.vocab_size": "128256"})
    assert accounting.parameters(config.model).total == 8_030_261_248


def test_the_quickstart_twins_differ_in_objective_and_causality_only():
    llada, arm = read("quickstart:llada"), read("quickstart:arm")
    assert accounting.parameters(llada.model) == accounting.parameters(arm.model)
    assert (llada.data, llada.train, llada.seed) == (arm.data, arm.train, arm.seed)
    assert transformer.abstract_parameters(llada.model) == transformer.abstract_parameters(arm.model)


def test_the_best_objective_changes_the_objective_alone():
    """Experiment files keep the paper's recipe; `:best` is what the study in docs/objectives ranks first."""
    for name in ("llada_1b", "llada_8b", "quickstart:llada"):
        plain, best = read(name), read(f"{name.partition(':')[0]}:best")
        assert plain.objective.variant == "" and best.objective.variant == "time_law=logit_normal, weight=paper"
        assert dataclasses.replace(best, objective=plain.objective) == plain


def test_fine_tuning_has_the_papers_schedule():
    """Section 2.3 and appendix B.1: 3 epochs of 4.5 M pairs; 50 steps of warm-up; the last tenth down to a tenth."""
    config = read("sft")
    assert config.fine_tunes and config.train.epochs == 3
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=None, steps=52_734))
    rate = jax.jit(optimizer.learning_rate(config))
    last = config.steps
    wanted = {0: 2.5e-5 / 50, 24: 1.25e-5, 49: 2.5e-5, int(0.9 * last) - 1: 2.5e-5, last - 1: 2.5e-6}
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-3), step
    assert float(rate(int(0.95 * last))) == pytest.approx(1.375e-5, rel=1e-2)


def test_the_two_plateau_schedule_has_the_papers_values():
    """Appendix B.2 in steps of 5,242,880 tokens: 2,000 / 228,882 / 381,470 / 438,690."""
    config = read("llada_8b")
    assert config.tokens_per_step == 5_242_880 and config.steps == 438_690
    rate = jax.jit(optimizer.learning_rate(config))
    wanted = {0: 2e-7, 999: 2e-4, 1_999: 4e-4, 228_880: 4e-4, 228_882: 1e-4, 381_468: 1e-4, 438_689: 1e-5}
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-3), step
    middle = (381_470 + 438_690) // 2
    assert float(rate(middle)) == pytest.approx(5.5e-5, rel=1e-2)


def test_overrides_reach_every_kind_of_key():
    overrides = {
        "seed": "3", "model.kv_heads": "1", "mesh.data": "None", "optimizer.peak_learning_rate": "1e-4",
        "model.tie_embeddings": "true", "data.source": "text:/a/*.txt", "train.tokens": "1e6",
    }  # fmt: skip
    config = read("quickstart", **overrides)
    assert config.seed == 3 and config.model.kv_heads == 1 and config.mesh.data is None
    assert config.optimizer.peak_learning_rate == 1e-4 and config.model.tie_embeddings
    assert config.train.tokens == 1_000_000 and config.train.steps is None  # naming one takes back the other
