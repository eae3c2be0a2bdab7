"""A LLaDA and an ARM of the same size on the same tokens, in minutes on two CPU cores.

llada train --config=experiments/quickstart.py:llada --workdir=runs/quickstart/llada
llada train --config=experiments/quickstart.py:arm   --workdir=runs/quickstart/arm
"""

from llada.config import default_config, pick


def get_config(argument="llada"):
    """`llada` or `arm`; they differ in the objective and in causal attention only."""
    c = default_config()
    c.objective.name, c.model.causal, c.objective.random_length_fraction = pick(
        argument, {"llada": ("diffusion", False, 0.01), "arm": ("autoregressive", True, 0.0)}
    )
    c.model.update(dict(layers=4, width=256, heads=4, ffn=704, vocab_size=1024, max_length=128))
    c.model.update(dict(dtype="float32", scan_unroll=4))  # what a CPU is fastest with
    c.data.sequence_length = 128
    c.data.holdout_fraction = 0.05
    c.train.batch_size = 32
    c.train.steps = 400
    c.optimizer.peak_learning_rate = 2e-3
    c.optimizer.schedule = "0:0 5%:1 60%:1 100%:0.05"
    c.evaluate.update(dict(every=100, batches=8, draws=4))
    c.checkpoint.every = 100
    return c
