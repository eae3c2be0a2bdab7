"""Training objectives that are said to be better than LLaDA's own, ranked by one held-out bound, for llada sweep.

llada sweep --config=experiments/objectives.py:quick --workdir=runs/objectives/ranking
llada sweep --config=experiments/objectives.py:bell --workdir=runs/objectives/bell        # one of them beside the ARM
llada train --config=experiments/llada_1b.py --workdir=DIR \
    --config.objective.time_law=logit_normal --config.objective.weight=paper              # ... in any run of one's own

quick    plain LLaDA and every variant below: two sizes x two budgets x three seeds, model and data of isoflop:quick
VARIANT  its name: budgets x five sizes of the variant, plain LLaDA and the ARM, for exponents and compute gaps
full     every variant on SMDM's sizes and budgets (isoflop:smdm), for a cluster
judge    for llada train: an ARM on the same rows, which scores what the ranked models write

launch/quickstart_objectives.sh does all of it but `full` and writes a page.
"""

import runpy
from pathlib import Path

from llada.config import pick

ISOFLOP = runpy.run_path(str(Path(__file__).with_name("isoflop.py")))

# Name -> keys of `objective`. LLaDA's own: t uniform, weight 1/p, each token masked by itself (Eq. (3)).
VARIANTS = {
    # Bell-shaped t (arXiv 2605.13026). With the paper's weight 1/p it trains on another integral over t than the bound;
    # a tenth of uniform t bounds the importance weights that make it the bound again.
    "bell": dict(time_law="logit_normal", weight="paper"),
    "bell_bound": dict(time_law="logit_normal", time_uniform_share=0.1, weight="elbo"),
    # Neither nearly all nor nearly none masked (BD3-LM, arXiv 2503.09573).
    "band": dict(time_law="band", time_low=0.1, time_high=0.9, weight="paper"),
    # Plain cross-entropy of masked tokens: arXiv 2602.15014, and LLaDA2.0's weight (arXiv 2512.15745).
    "flat": dict(weight="flat"),
    "bell_flat": dict(time_law="logit_normal", weight="flat"),
    # No weight above 10: what min-SNR does for Gaussian diffusion (arXiv 2303.09556).
    "clipped": dict(weight="clipped", weight_bound=10.0),
    # l of L tokens masked, as in Eq. (6): the evaluation's estimator, of lower variance.
    "exact_count": dict(masks="exact_count"),
    # Each row twice, m and not m, so that every token is predicted once (LLaDA2.0, arXiv 2512.15745).
    "complementary": dict(masks="complementary"),
    "complementary_flat": dict(masks="complementary", weight="flat"),
    # Half of the sequences go on from a clean beginning, as prompts do (PCD, arXiv 2608.09424).
    "clean_prefix": dict(clean_prefix=0.5),
}


def get_config(argument="quick"):
    """`quick`, `full`, `judge`, or the name of a variant."""
    studies = {name: lambda name=name: study(name) for name in VARIANTS}
    return pick(argument, {"quick": quick, "full": full, "judge": judge, **studies})()


def quick():
    """Sizes and budgets for two cores (`--dry_run` tells how long they take); norms of gradients are logged finely."""
    c = ISOFLOP["quick"]()
    c.train.log_every = 20
    # Near plain LLaDA's best size at these budgets, and one above it, as variants may want more parameters.
    sizes = tuple(size for size in c.sweep.sizes if size["width"] in (24, 36))
    c.sweep = ranking(c.sweep, budgets=(1e11, 2.5e11), sizes=sizes)
    return c


def full():
    """Budgets of SMDM and about the best sizes there: 3e21 FLOPs (6ND) in all."""
    c = ISOFLOP["smdm"]()
    c.train.log_every = 50
    sizes = tuple(ISOFLOP["smdm_shape"](layers, width) for layers, width in ((12, 768), (16, 1024)))
    c.sweep = ranking(c.sweep, budgets=(6e18, 1e19, 3e19), sizes=sizes)
    return c


def ranking(sweep, budgets, sizes):
    """The group `sweep` with plain LLaDA and all variants in every size at every budget, three seeds each."""
    of_isoflop = ("tokens_per_parameter", "sizes_per_budget")
    group = {key: value for key, value in sweep.items() if key not in of_isoflop}
    axes = dict(mode="variants", objectives=("diffusion",), variants=VARIANTS, seeds=(0, 1, 2))
    return dict(group, budgets=budgets, sizes=sizes, **axes)


def study(name):
    """The sizes of isoflop:quick at two budgets, once more with the variant; a third would double the cost."""
    c = ISOFLOP["quick"]()
    c.sweep.update(dict(budgets=(2e11, 4e11), variants={name: VARIANTS[name]}))
    return c


def judge():
    """Four times the layers' parameters of the largest ARM of isoflop:quick, on 3 M tokens of its rows."""
    c = ISOFLOP["quick"]()
    del c.sweep
    c.model.update(dict(layers=4, width=128, heads=8, ffn=344, causal=True))
    c.objective.update(dict(name="autoregressive", random_length_fraction=0.0))
    c.train.steps = 3000
    c.optimizer.update(dict(peak_learning_rate=6e-3, schedule="0:0 5%:1 60%:1 100%:0.05"))
    c.evaluate.update(dict(every=0, batches=32))
    c.checkpoint.every = 500
    return c
