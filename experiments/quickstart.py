"""A LLaDA and an ARM of the same size on the same tokens, in minutes on two CPU cores.

llada train --config=experiments/quickstart.py:llada --workdir=runs/quickstart/llada
llada train --config=experiments/quickstart.py:best  --workdir=runs/quickstart/best
llada train --config=experiments/quickstart.py:arm   --workdir=runs/quickstart/arm
"""

from llada.config import BEST_OBJECTIVE, default_config, pick


def get_config(argument="llada"):
    """`llada` or `arm`: they differ in the objective and in causal attention only; `best`: LLaDA by another one."""
    c = default_config()
    objectives = {"llada": {}, "arm": dict(name="autoregressive", random_length_fraction=0.0), "best": BEST_OBJECTIVE}
    c.objective.update(pick(argument, objectives))
    c.model.causal = argument == "arm"
    # 2.0 M parameters; 1,500 steps x 16 rows x 64 tokens = 1.54 M tokens, a third of an epoch of the standard library.
    c.model.update(dict(layers=4, width=192, heads=3, ffn=512, vocab_size=1024, max_length=64))
    # With so few tokens both of these matter to the mask predictor: queries and keys of one length, one shared table.
    c.model.update(dict(qk_norm=True, tie_embeddings=True, init_std=0.05))
    c.model.update(dict(dtype="float32"))  # what a CPU is fastest with
    c.data.sequence_length = 64
    c.data.holdout_fraction = 0.05
    c.train.update(dict(batch_size=16, steps=1500, log_every=50))
    c.optimizer.peak_learning_rate = 5e-3
    c.optimizer.schedule = "0:0 5%:1 60%:1 100%:0.05"
    c.evaluate.update(dict(every=250, batches=16, draws=4))
    c.checkpoint.every = 250
    return c
