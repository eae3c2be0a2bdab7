"""Fine-tuning in minutes on two CPU cores: a base model, then instructions; launch/quickstart_sft.sh does all of it.

llada train --config=experiments/quickstart_sft.py:llada --workdir=runs/sft/base_llada \
    --config.data.source=text:DATA/text.jsonl
llada train --config=experiments/quickstart_sft.py:sft --workdir=runs/sft/llada --init=runs/sft/base_llada \
    --config.data.source=dialogues:DATA/train.jsonl --config.data.holdout_source=dialogues:DATA/held_out.jsonl
"""

from llada.config import default_config, pick


def get_config(argument="llada"):
    """`llada` and `arm` are the base models, twins; `sft` fine-tunes either of them."""
    return pick(argument, {"llada": base, "arm": base_arm, "sft": sft})()


def base():
    """0.5 M parameters. Rows are short: a rotary base of 1,000 tells their positions apart better than 500,000."""
    c = default_config()
    c.model.update(dict(layers=4, width=96, heads=6, ffn=256, vocab_size=480, max_length=128, rope_theta=1000.0))
    c.model.update(dict(qk_norm=True, tie_embeddings=True, init_std=0.05, dtype="float32"))
    c.objective.random_length_fraction = 0.0
    c.data.update(dict(sequence_length=128, holdout_fraction=0.02))
    c.train.update(dict(batch_size=8, steps=2000, log_every=100))
    c.optimizer.peak_learning_rate = 4e-3
    c.optimizer.schedule = "0:0 5%:1 80%:1 100%:0.2"
    c.evaluate.update(dict(every=1000, batches=16, draws=4))
    c.checkpoint.every = 1000
    return c


def base_arm():
    """The same but for objective and attention."""
    c = base()
    c.objective.name, c.model.causal = "autoregressive", True
    return c


def sft():
    """Each example is padded to a multiple of 16 tokens, twice the longest answer, and as many as fit share a row.

    With multiples of 8 the end of the padding told too often how long the answer is: in training only.
    """
    c = base()
    c.dialogues.bucket = 16
    # Answers have at most 8 tokens: a smaller share of them is none, and 1/p of the rare ones would be mostly noise.
    c.objective.eps = 0.1
    c.optimizer.beta2 = 0.98
    c.train.steps = 7000
    c.optimizer.schedule = "0:0 3%:1 100%:0.02"
    c.evaluate.update(dict(every=3500, batches=32, draws=4))
    c.checkpoint.every = 3500
    return c
