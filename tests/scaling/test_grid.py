"""The grid: every number of a run that a rule makes, and what cannot be planned."""

import copy
import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest

from llada import accounting, knobs
from llada import config as config_lib
from llada.commands import experiment
from llada.config import Config, ModelConfig, TrainConfig
from llada.errors import UserError
from llada.scaling import grid, grid_checks, sweep_config
from llada.scaling import sweep as sweep_lib

ROOT = Path(__file__).resolve().parents[2]


def planned(argument: str, directory=Path("sweep"), **overrides: str):
    """Grid and runs of experiments/isoflop.py."""
    base, group = experiment.read_sweep(f"{ROOT / 'experiments' / 'isoflop.py'}:{argument}", overrides)
    sweep = sweep_config.parse(group)
    return sweep, grid.plan(base, sweep, directory)


@pytest.mark.parametrize("argument", ["quick", "smdm"])
@pytest.mark.parametrize("matching", ["6nd", "exact"])
def test_runs_of_a_budget_cost_the_budget_by_the_count_that_was_named(argument, matching):
    sweep, runs = planned(argument, **{"sweep.matching": matching})
    per_token = {"6nd": lambda c: accounting.flops_6nd_per_token(c.model), "exact": accounting.flops_exact_per_token}
    for run in runs:
        (reading,) = run.readings
        cost = run.tokens * per_token[matching](run.config)
        assert cost == pytest.approx(reading.budget, rel=0.5 / grid.LEAST_STEPS)
        assert reading.step == run.config.steps
    for budget in sweep.budgets:
        for objective in sweep.objectives:
            sizes = {r.size for r in runs if r.readings[0].budget == budget and r.objective == objective}
            assert len(sizes) >= 4


def test_quick_twins_differ_in_the_objective_alone():
    """By 6ND both families train a size on the same tokens in the same batches."""
    sweep, runs = planned("quick")
    llada, arm = ({(r.size, r.group): r for r in runs if r.objective == name} for name in sweep.objectives)
    assert len(llada.keys() & arm.keys()) >= 8
    for key in llada.keys() & arm.keys():
        a, b = llada[key].config, arm[key].config
        assert (a.data, a.optimizer, a.train, a.evaluate, a.seed) == (b.data, b.optimizer, b.train, b.evaluate, b.seed)
        assert not a.model.causal and b.model.causal


def test_the_ladder_is_smdms():
    """Parameters without embeddings in millions, as its configurations are called."""
    sweep, _ = planned("smdm")
    counts = [round(accounting.parameters(ModelConfig(**size)).non_embedding / 1e6) for size in sweep.sizes]
    assert counts == [
        6,
        19,
        34,
        48,
        66,
        85,
        113,
        142,
        170,
        180,
        206,
        231,
        268,
        302,
        336,
        472,
        551,
        629,
        571,
        666,
        761,
        717,
        831,
        944,
        1028,
        1233,
        1476,
        1678,
        2121,
    ]


def test_the_papers_runs_are_read_at_the_budgets_they_reach():
    sweep, runs = planned("paper")
    by_name = {run.name: run for run in runs}
    assert set(by_name) == {"llada_1B_curve", "llada_8B_curve", "arm_1B_curve", "arm_7B_curve"}
    one, eight = by_name["llada_1B_curve"], by_name["llada_8B_curve"]
    assert [r.budget for r in one.readings] == list(sweep.budgets[:5])
    assert [r.budget for r in eight.readings] == list(sweep.budgets[4:])
    assert eight.tokens == pytest.approx(1975.5e9, rel=0.01)  # Table 18's last row
    assert len(eight.config.evaluate.at.split()) == len(eight.readings) - 1  # the last is the end


def test_rules_for_rate_batch_and_schedule():
    changes = {
        "sweep.reference_tokens": "1e6",
        "sweep.batch_exponent": "0.5",
        "sweep.largest_batch": "64",
        "sweep.warmup_steps": "120",
        "sweep.warmup_fraction": "0.01",
    }
    sweep, runs = planned("quick", **changes)
    for run in runs:
        c = run.config
        rate = 5e-3 * (sweep.reference_width / c.model.width) ** sweep.learning_rate_exponent
        assert c.optimizer.peak_learning_rate == pytest.approx(rate)
        wanted = 16 * math.sqrt(run.tokens / 1e6)
        assert c.train.batch_size in (16, 32, 64)
        if 16 < wanted < 64:
            assert 1 / math.sqrt(2) <= c.train.batch_size / wanted * (1 + 1e-3) <= math.sqrt(2) * (1 + 2e-3)
        assert c.evaluate.batches * c.train.batch_size == sweep.evaluation_rows
        first, warm, *rest = c.optimizer.schedule.split()
        steps = float(warm.partition(":")[0]) / c.tokens_per_step
        assert first == "0:0" and steps == min(max(math.ceil(0.01 * c.steps), 120), c.steps // 5)
        assert " ".join(rest) == sweep.decay


def test_every_seed_is_a_run_of_its_own():
    _, runs = planned("quick", **{"sweep.seeds": "3,5"})
    assert {run.config.seed for run in runs} == {3, 5} and len({run.name for run in runs}) == len(runs)
    assert all(run.name.endswith(f"_s{run.seed}") for run in runs)


def test_repetition_reads_after_whole_epochs():
    sweep, runs = planned("repeat")
    for run in runs:
        unique = run.config.data.unique_tokens // 64 * 64
        for reading, epochs in zip(run.readings, sweep.epochs, strict=True):
            assert abs(reading.step * run.config.tokens_per_step - epochs * unique) <= run.config.tokens_per_step / 2
        assert run.config.optimizer.schedule.count(":") == 2  # no annealing


@pytest.mark.parametrize("jobs", [1, 3, 7, 60])
def test_shares_are_a_partition_of_about_equal_cost(jobs):
    _, runs = planned("quick")
    shares = [grid.share(runs, f"{i}/{jobs}") for i in range(1, jobs + 1)]
    assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in runs)
    if jobs <= 7:
        costs = [sum(run.flops for run in share) for share in shares]
        assert max(costs) < 1.15 * min(costs)


WRONG = [
    ({"sweep.budgets": "1e12,5e11"}, "must rise"),
    ({"sweep.budgets": "1e12,1e12"}, "must rise"),
    ({"sweep.budgets": ""}, "needs one or more"),
    ({"sweep.budgets": "many"}, "needs one or more"),
    (
        {"train.batch_size": "4096", "sweep.evaluation_rows": "4096"},
        "steps of 262144 tokens .*less than 20; raise the budget",
    ),
    ({"sweep.matching": "flops"}, "6nd, exact"),
    ({"sweep.mode": "both"}, "isoflop, checkpoints, repeat, variants"),
    ({"sweep.objectives": "diffusion,arm"}, "diffusion, autoregressive"),
    ({"sweep.seeds": "a"}, "whole numbers"),
    ({"sweep.sizes_per_budget": "2"}, "a parabola needs 3"),
    ({"sweep.budgets": "3e11,1e16"}, "leaves 0 sizes of diffusion with 10 to 1500"),
    ({"sweep.evaluation_rows": "100"}, "not a multiple of the batch of 16"),
    ({"sweep.warmup_fraction": "1.5"}, r"\[0, 1\)"),
    ({"sweep.budget": "1e12"}, "did you mean --config.sweep.budgets"),
    ({"model.layer": "1"}, "did you mean --config.model.layers"),
    ({"train.batch_size": "x"}, "not a whole number"),
]


@pytest.mark.parametrize(
    ("overrides", "said"), WRONG, ids=[f"{k}={v}" for o, _ in WRONG for k, v in list(o.items())[:1]]
)
def test_what_cannot_be_planned_is_refused_in_words(overrides, said):
    with pytest.raises(UserError, match=said):
        planned("quick", **overrides)


FAR = 1e41
NO_NUMBERS = ["x", None, math.nan, math.inf, -1, True, [1], {}, FAR]
NO_LISTS = [5, None, "x", (), ("x",), (None,), ([1],), ({},)]
OF_NO_VARIANT = [("wieght", "flat"), ("weight", "heavy"), ("weight_bound", 0), ("clean_prefix", 1.5), ("masks", 3)]
OF_NO_VARIANT += [("name", "arm"), ("head_rows", 8), ("block_cross_document_attention", True), ("eps", "x")]
OF_NO_VARIANT += [("dropout", 2.0), ("dropout", "x"), ("width", 8)]
BAD_VALUES = {
    "mode": ["both", None, 5, ["isoflop"]],
    "matching": ["flops", None, 5],
    "budgets": [*NO_LISTS, (0,), (-1e9,), (math.nan,), (math.inf,), (True, 1e12), (2e12, 1e12), (1e12, FAR)],
    "sizes": [*NO_LISTS, ({},) * 3, (dict(width=64),) * 3],
    "objectives": [*NO_LISTS, ("arm",), ("diffusion", "diffusion")],
    "variants": [
        *(5, None, "x", ("x",), {"bell": {}}, {"bell": None}, {"bell": 5}, {"bell": "flat"}, {5: {"weight": "flat"}}),
        *({name: {"weight": "flat"}} for name in ("", "a b", "a/b", "../x", "a" * 41, "LLaDA", "arm", "diffusion")),
        {"a": {"weight": "flat"}, "A": {"masks": "exact_count"}},
        *({"v": {key: value}} for key, value in OF_NO_VARIANT),
        {"plain": {"weight": "elbo"}},
        {"a": {"weight": "flat"}, "b": {"weight": "flat", "name": "diffusion"}},
        {"v": {"weight": "flat", "name": "autoregressive"}},  # which has no masks
        {"v": {"time_low": 0.1}},  # without its law
    ],
    "seeds": [*NO_LISTS, (0, 0), (-1,), (0.5,), (2**31,), (True,), (math.nan,)],
    "tokens_per_parameter": [
        10,
        None,
        "x",
        (1, 2),
        {"arm": (1, 2)},
        *(
            {"diffusion": w}
            for w in (
                10,
                None,
                "10,20",
                (),
                (1,),
                (1, 2, 3),
                (2, 1),
                (1, 1),
                (-1, 2),
                ("a", "b"),
                (math.nan, 2),
                (0, math.inf),
            )
        ),
    ],
    "sizes_per_budget": ["x", 0, -3, 2, 3.5, math.nan, [5], 10**9],
    "unique_tokens": [(1000,)],  # of another mode
    "epochs": [(1, 2)],
    "max_epochs": [*NO_NUMBERS, 0],
    "reference_width": [*NO_NUMBERS, 0, 2.5],
    "learning_rate_exponent": ["x", None, math.nan, math.inf, [1], 99],
    "reference_tokens": [*NO_NUMBERS, 0],
    "batch_exponent": ["x", None, math.nan, math.inf, [1], 99],
    "largest_batch": [*NO_NUMBERS, 0, 2.5],
    "warmup_fraction": [*NO_NUMBERS, 1.0],
    "warmup_steps": [*NO_NUMBERS, 1.5],
    "decay": [5, None, ["100%:1"], "soon", "100%", "50%:1 20%:0", "100%:-1", "100%:nan"],
    "evaluation_rows": [*NO_NUMBERS, 0, 100, 2.5],
    "annealing_gain": [*NO_NUMBERS, 1.0],
}


@pytest.fixture(scope="module")
def quick_group():
    return experiment.read_sweep(f"{ROOT / 'experiments' / 'isoflop.py'}:quick", {})


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(sweep_config.SweepConfig)])
def test_no_key_of_a_sweep_takes_what_it_cannot_be(key, quick_group, tmp_path):
    base, group = quick_group
    for bad in BAD_VALUES[key]:
        with pytest.raises(UserError, match=rf"sweep\.{key}\b|sweep\.sizes"):
            sweep_lib.make(tmp_path, base, group | {key: bad}, in_file=True)
            pytest.fail(f"{key}={bad!r} was taken")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"objective": "difusion"}, "its objective must be one of diffusion, autoregressive"),
        ({"widht": 3}, "'widht' is none of name, objective, peak_learning_rate, layers"),
        ({"name": "../x"}, "without slashes"),
        ({"name": 5}, "without slashes"),
        ({"peak_learning_rate": "high"}, "must be a positive number"),
        ({"peak_learning_rate": math.nan}, "must be a positive number"),
        ({"causal": True}, "objective='autoregressive'"),
        ({"vocab_size": 99}, "config.model.vocab_size"),
        ({"heads": 5}, "model.heads=5"),
        ({"width": "64"}, "model.width"),
    ],
)
def test_a_size_that_is_none_is_refused(size, said, quick_group):
    base, group = quick_group
    sizes = (group["sizes"][0] | size, *group["sizes"][1:])
    with pytest.raises(UserError, match=said):
        grid.plan(base, sweep_config.parse(group | {"sizes": sizes}), Path("sweep"))


def test_every_key_that_rules_overwrite_is_refused(quick_group, tmp_path):
    """Found by comparing: whatever no run has as it was given, from the file or the command line."""
    base, group = quick_group
    own = {
        "seed": 7,
        "objective.name": "autoregressive",
        "model.causal": True,
        "model.width": 999,
        "model.layers": 99,
        "model.heads": 99,
        "model.ffn": 99,
        "data.directory": "d",
        "train.steps": 10,
        "train.tokens": 10**6,
        "optimizer.schedule": "0:1",
        "evaluate.every": 10,
        "evaluate.at": "50%",
        "evaluate.batches": 99,
    }
    planned = [config_lib.to_dict(run.config) for run in grid.plan(base, sweep_config.parse(group), tmp_path)]
    default = config_lib.to_dict(Config(train=TrainConfig()))
    made = {
        key.name
        for key in knobs.keys(Config)
        if all(grid_checks._at(tree, key.name) != grid_checks._at(base, key.name) for tree in planned)
    }
    # These start the rules, are written out in full, or have no value to give.
    assert made - {"optimizer.peak_learning_rate", "data.tokenizer"} <= own.keys()
    for key, value in own.items():
        tree = copy.deepcopy(base)
        *groups, leaf = key.split(".")
        functools.reduce(dict.__getitem__, groups, tree)[leaf] = value
        with pytest.raises(UserError, match=f"--config.{key}=.* would do nothing in a sweep"):
            sweep_lib.make(tmp_path, tree, group, in_file=True)
        same = grid_checks._at(default, key)
        if same is not None and any(grid_checks._at(tree, key) != same for tree in planned):  # the default, typed
            with pytest.raises(UserError, match=f"--config.{key}=.* would do nothing in a sweep"):
                sweep_lib.make(tmp_path, base, group, typed=[key])
        sweep_lib.make(tmp_path, tree, group)  # as an older sweep.json may say
    tree = copy.deepcopy(base)
    tree["evaluate"]["draws"] = 1
    with pytest.raises(UserError, match=r"evaluate\.draws=1 tells no Monte Carlo error"):
        sweep_lib.make(tmp_path, tree, group, in_file=True)


def test_a_size_may_have_its_own_rate_and_a_family_needs_a_size(quick_group):
    base, group = quick_group
    first, *others = group["sizes"]
    sizes = (first | {"peak_learning_rate": 1e-4}, *others)
    runs = grid.plan(base, sweep_config.parse(group | {"sizes": sizes}), Path("x"))
    rates = {run.size: run.config.optimizer.peak_learning_rate for run in runs}
    assert rates["L2-d16"] == 1e-4 and rates["L2-d24"] == pytest.approx(5e-3 * (192 / 24) ** 0.5)
    one_family = tuple(size | {"objective": "diffusion"} for size in group["sizes"])
    repeat = {"mode": "repeat", "unique_tokens": (20_000,), "epochs": (1, 2), "sizes": one_family}
    checkpoints = {"mode": "checkpoints", "budgets": (1e12,), "sizes": one_family}
    for values in (repeat, checkpoints):
        with pytest.raises(UserError, match=r"sizes=\(0 of autoregressive\): add a size of that family"):
            sweep_config.parse(values)
        assert grid.plan(base, sweep_config.parse(values | {"objectives": ("diffusion",)}), Path("x"))
    with pytest.raises(UserError, match="are the same step"):
        grid.plan(base, sweep_config.parse(repeat | {"epochs": (1, 1.0001), "objectives": ("diffusion",)}), Path("x"))
    twins = (first, *(first | {"name": f"again{i}"} for i in range(2)))
    with pytest.raises(UserError, match="leaves 1 sizes"):
        grid.plan(base, sweep_config.parse(group | {"sizes": twins}), Path("x"))


def test_what_a_grid_leaves_out_is_named(quick_group, tmp_path):
    base, group = quick_group
    sweep = sweep_lib.make(tmp_path, base, group)
    said = sweep_lib.remarks(sweep)
    planned = {(run.objective, run.readings[0].budget, run.size) for run in sweep.runs}
    assert len(said) == 8
    for text in said:
        objective, budget, names = re.match(r"left out: (\w+) at (\S+) FLOPs: (.*) \(", text).groups()
        left = names.split(", ")
        there = [size for o, b, size in planned if (o, b) == (objective, float(budget))]
        assert not set(left) & set(there) and len(left) + len(there) == 9


def test_rows_and_tokenizer_are_named_in_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for run in planned("quick", Path("sweep"), **{"data.tokenizer": "t.model"})[1][:1]:
        assert run.config.data.directory == str(tmp_path / "sweep" / "data")
        assert run.config.data.tokenizer == str(tmp_path / "t.model")


def test_a_grid_of_one_size_is_refused(tmp_path):
    path = tmp_path / "one.py"
    path.write_text(
        "from llada.config import default_config\n"
        "def get_config():\n"
        "    c = default_config()\n"
        "    c.sweep = dict(budgets=(1e12,), sizes=(dict(layers=2, width=32, heads=2, ffn=64),))\n"
        "    return c\n"
    )
    _, group = experiment.read_sweep(str(path), {})
    with pytest.raises(UserError, match=r"sizes=\(1 of diffusion\): a parabola"):
        sweep_config.parse(group)
    with pytest.raises(UserError, match="describes a sweep"):
        experiment.read(str(path), {})
    with pytest.raises(UserError, match="has no group"):
        experiment.read_sweep(str(ROOT / "experiments" / "quickstart.py"), {})


@pytest.mark.parametrize("only", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "²/3", "1/9999999999", "1/2/3", ""])
def test_a_share_that_is_none_is_refused(only):
    with pytest.raises(UserError, match="--only="):
        grid.share([], only)


def test_a_corpus_too_small_for_the_tokens_is_refused_in_epochs():
    sweep, runs = planned("quick")
    longest = max(run.tokens for run in runs)
    grid_checks.check_epochs(runs, sweep, math.ceil(longest / sweep.max_epochs))
    with pytest.raises(UserError, match=r"epochs of the corpus's 100000; .*max_epochs="):
        grid_checks.check_epochs(runs, sweep, 100_000)
    sweep, runs = planned("repeat")
    with pytest.raises(UserError, match="more than the corpus has, 50000"):
        grid_checks.check_epochs(runs, sweep, 50_000)


VARIANTS = dict(
    bell=dict(time_law="logit_normal", weight="paper"),
    paired=dict(masks="complementary"),
    masked_arm=dict(name="autoregressive", input_masking=0.1),
)


def with_variants(quick_group, **changes):
    base, group = quick_group
    return base, sweep_config.parse(group | {"variants": VARIANTS} | changes)


def test_a_variant_is_its_family_with_its_keys_in_every_size_budget_and_seed(quick_group, tmp_path):
    """And the plain runs are those of a sweep without variants, to the last key."""
    base, group = quick_group
    plain = grid.plan(base, sweep_config.parse(group), tmp_path)
    runs = grid.plan(*with_variants(quick_group), tmp_path)
    assert [run for run in runs if run.variant is None] == plain
    for name, keys in VARIANTS.items():
        family = keys.get("name", "diffusion")
        of_family = {(r.size, r.group): r for r in plain if r.objective == family}
        own = {(r.size, r.group): r for r in runs if r.variant == name}
        assert own.keys() == of_family.keys()
        for key, run in own.items():
            config = of_family[key].config
            expected = dataclasses.replace(config, objective=dataclasses.replace(config.objective, **keys))
            assert run.config == expected and run.readings == of_family[key].readings
            prefix, rest = of_family[key].name.split("_", 1)
            assert run.name == f"{prefix}-{name}_{rest}"
    assert len({run.name for run in runs}) == len(runs)


def test_a_variant_has_the_window_of_its_family_or_its_own(quick_group, tmp_path):
    base, group = quick_group
    windows = group["tokens_per_parameter"] | {"bell": (0, 400)}
    sweep = sweep_lib.make(tmp_path, base, group | {"variants": VARIANTS, "tokens_per_parameter": windows})
    for run in sweep.runs:
        n = accounting.parameters(run.config.model).non_embedding
        least, most = windows.get(run.variant) or windows[run.objective]
        assert least * 0.97 <= run.tokens / n <= most * 1.03
    said = grid_checks.left_out(base, sweep.config, sweep.runs)
    assert any(text.startswith("diffusion:bell at") for text in said) and not any(":paired" in text for text in said)


def test_variants_alone_and_those_that_read_a_row_twice(quick_group, tmp_path):
    base, sweep = with_variants(quick_group, objectives=())
    runs = grid.plan(base, sweep, tmp_path)
    assert {run.series.key for run in runs} == {"diffusion:bell", "diffusion:paired", "autoregressive:masked_arm"}
    twins = {run.variant: run for run in runs if run.size == "L2-d48" and run.group == "C=6e+11"}
    assert twins["paired"].tokens == twins["bell"].tokens == 2 * twins["paired"].tokens_read
    longest = max(run.tokens_read for run in runs)
    grid_checks.check_epochs(runs, sweep, math.ceil(longest / sweep.max_epochs))
    repeat = dict(
        mode="repeat", sizes=quick_group[1]["sizes"][:1], unique_tokens=(20_000,), epochs=(1, 4), variants=VARIANTS
    )
    by_variant = {run.variant: run for run in grid.plan(base, sweep_config.parse(repeat), tmp_path)}
    assert by_variant["paired"].config.steps == pytest.approx(2 * by_variant["bell"].config.steps, abs=1)


def test_a_ranking_needs_variants_and_their_plain_families_but_not_three_sizes(quick_group, tmp_path):
    base, group = quick_group
    ranking = {"mode": "variants", "sizes": group["sizes"][2:4], "budgets": (3e11,), "sizes_per_budget": None}
    for changes, said in (
        ({}, "mode variants ranks them"),
        ({"variants": VARIANTS, "objectives": ("diffusion",)}, "add autoregressive"),
        ({"variants": VARIANTS, "epochs": (1, 2)}, "does nothing in mode variants"),
    ):
        with pytest.raises(UserError, match=said):
            sweep_lib.make(tmp_path, base, group | ranking | changes, in_file=True)
    runs = grid.plan(base, sweep_config.parse(group | ranking | {"variants": VARIANTS}), tmp_path)
    assert len(runs) == 2 * 5
    assert {run.config.optimizer.schedule.count(":") for run in runs} == {4}  # annealed


def test_keys_of_a_variant_can_be_typed(quick_group, tmp_path):
    base, group = quick_group
    typed = {"sweep.variants.bell.time_std": "0.5", "sweep.variants.clip.weight": "clipped"}
    group = copy.deepcopy(group) | {"variants": {"bell": dict(VARIANTS["bell"]), "clip": {"weight_bound": 10}}}
    sweep = sweep_config.parse(experiment.override_sweep(copy.deepcopy(base), group, typed)[1])
    assert sweep.variants == {
        "bell": {"time_law": "logit_normal", "weight": "paper", "time_std": 0.5},
        "clip": {"weight_bound": 10.0, "weight": "clipped"},
    }
