"""Scaling laws of LLaDA beside ARM: grids of runs under FLOP budgets, for llada sweep.

llada sweep --config=experiments/isoflop.py:quick --workdir=runs/isoflop          # minutes on two CPU cores
llada sweep --config=experiments/isoflop.py:smdm --workdir=DIR --only=1/8 \
    --config.data.source='text:/data/*.jsonl' --config.data.tokenizer=/data/tokenizer.model

quick   four budgets x five sizes x two families on Python's standard library, rows of 64 tokens
smdm    SMDM's grid (arXiv 2410.18514, section 4): five budgets from 6e18 to 1e20, its ladder of sizes
paper   LLaDA's own study (section 3.1): one run a model, 1B and 8B beside ARMs of 1B and 7B, read at many checkpoints
repeat  data-limited: small amounts of unique data, read again and again
"""

import math

from llada.config import default_config, pick


def get_config(argument="quick"):
    """`quick`, `smdm`, `paper` or `repeat`: the base that all runs share, and the group `sweep`."""
    return pick(argument, {"quick": quick, "smdm": smdm, "paper": paper, "repeat": repeat})()


def quick():
    """Budgets at which two cores need half an hour for all runs, and sizes about the best ones there."""
    c = default_config()
    c.model.update(dict(vocab_size=384, max_length=64, qk_norm=True, tie_embeddings=True, init_std=0.05))
    c.model.update(dict(dtype="float32"))
    c.data.update(dict(sequence_length=64, holdout_fraction=0.05))
    c.train.update(dict(batch_size=16, log_every=100))
    c.evaluate.draws = 16
    c.checkpoint.update(dict(every=5000, keep=1))
    c.optimizer.peak_learning_rate = 5e-3
    c.sweep = dict(
        budgets=(3e11, 6e11, 1.2e12, 2.4e12),
        sizes=tuple(
            shape(2, width, heads)
            for width, heads in ((16, 1), (20, 2), (24, 2), (36, 3), (48, 4), (64, 4), (80, 5), (96, 6), (112, 7))
        ),
        tokens_per_parameter=dict(diffusion=(10, 1500), autoregressive=(2, 300)),
        sizes_per_budget=5,
        max_epochs=2.0,
        reference_width=192,
        learning_rate_exponent=0.5,
        warmup_fraction=0.05,
        decay="60%:1 100%:0.05",
    )
    return c


def smdm():
    """Learning rate as in SMDM's code (its paper says 4e-4), cosine to a tenth after 1 % of warm-up, batch 256."""
    c = default_config()
    c.model.update(dict(vocab_size=32_000, max_length=2048, remat="dots"))
    c.data.sequence_length = 2048
    c.train.batch_size = 256
    c.evaluate.draws = 128
    c.checkpoint.update(dict(every=1000, keep=2))
    c.optimizer.peak_learning_rate = 2e-4
    c.sweep = dict(
        budgets=(6e18, 1e19, 3e19, 6e19, 1e20),
        sizes=SMDM_LADDER,
        # About those that its minima lie at: 141 to 73 tokens per parameter for diffusion, 43 to 16 for the ARM.
        tokens_per_parameter=dict(diffusion=(10, 1000), autoregressive=(3, 300)),
        sizes_per_budget=7,
        warmup_fraction=0.01,
        warmup_steps=100,
        decay=cosine(0.1),
        evaluation_rows=1024,
    )
    return c


def paper():
    """Constant rate up to the largest budget; each model is read at every budget that it reaches.

    Budgets from section 3.1's figure: 2.2e20 to 8.3e22 FLOPs. LLaDA 1B and ARM 1B go to 2.7e21, as in Table 18.
    """
    c = default_config()
    c.model.update(dict(vocab_size=126_464, max_length=4096, remat="full"))
    c.data.sequence_length = 4096
    c.train.batch_size = 1280
    c.evaluate.draws = 128
    c.checkpoint.update(dict(every=1000, keep=2))
    c.optimizer.peak_learning_rate = 4e-4
    one = dict(layers=22, width=2048, heads=32, kv_heads=4, ffn=5632)
    c.sweep = dict(
        mode="checkpoints",
        budgets=(2.2e20, 5.1e20, 8.1e20, 1.4e21, 2.7e21, 5.3e21, 1.1e22, 2.1e22, 4.6e22, 8.3e22),
        sizes=(
            dict(name="1B", **one),
            dict(name="8B", objective="diffusion", layers=32, width=4096, heads=32, ffn=12288),
            dict(name="7B", objective="autoregressive", layers=28, width=4096, heads=32, kv_heads=8, ffn=13440),
        ),
        # As in Tables 18 and 19: 8B is read from 2.6e21 FLOPs on, 1B up to 2.7e21.
        tokens_per_parameter=dict(diffusion=(8, 480), autoregressive=(8, 480)),
        warmup_steps=2000,
        warmup_fraction=0.0,
        evaluation_rows=1280,
        annealing_gain=0.0,
    )
    return c


def repeat():
    """Two amounts of unique data, one size, up to 128 epochs: minutes on two CPU cores."""
    c = quick()
    c.sweep = dict(
        mode="repeat",
        sizes=(shape(2, 64, heads=4),),
        unique_tokens=(20_000, 100_000),
        epochs=(1, 2, 4, 8, 16, 32, 64, 128),
        reference_width=192,
        learning_rate_exponent=0.5,
    )
    return c


def shape(layers, width, heads):
    """A size with the gated FFN at about 8/3 of the width, in multiples of 8."""
    return dict(layers=layers, width=width, heads=heads, ffn=round(width / 3) * 8)


def smdm_shape(layers, width):
    """SMDM's rule: heads of 64 channels, of 128 from width 1280 on; FFN of 4 widths with a gate."""
    return dict(layers=layers, width=width, heads=width // (64 if width < 1280 else 128), ffn=4 * width)


# From SMDM's list of configurations, 6 M to 2.1 B parameters without embeddings: the depths of each width.
SMDM_DEPTHS = {
    256: (6,),
    384: (8,),
    512: (8,),
    576: (9,),
    640: (10, 13),
    768: (12, 15, 18),
    896: (14, 16, 18),
    1024: (16, 18, 20),
    1280: (18, 21, 24),
    1408: (18, 21, 24),
    1536: (19, 22, 25),
    1792: (20, 24),
    2048: (22, 25),
    2176: (28,),
}
SMDM_LADDER = tuple(smdm_shape(layers, width) for width, depths in SMDM_DEPTHS.items() for layers in depths)


def cosine(floor, points=16):
    """A cosine from 1 to `floor` over the rest of the run, as straight lines between `points` points."""
    share = [i / points for i in range(1, points + 1)]
    return " ".join(f"{100 * s:g}%:{floor + (1 - floor) * (1 + math.cos(math.pi * s)) / 2:.4f}" for s in share)
