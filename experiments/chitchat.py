"""Dialogues of people on two CPU cores: a base model, then fine-tuning; launch/chitchat.sh does all of it.

llada train --config=experiments/chitchat.py:base --workdir=runs/chitchat/base_llada \
    --config.data.source=text:DATA/text.jsonl
llada train --config=experiments/chitchat.py:sft --workdir=runs/chitchat/llada --init=runs/chitchat/base_llada \
    --config.data.source=dialogues:DATA/train.jsonl --config.data.holdout_source=dialogues:DATA/held_out.jsonl
"""

from llada.config import default_config, pick


def get_config(argument="base"):
    """`base` (LLaDA) and `base_arm` are twins; `sft` fine-tunes either of them."""
    return pick(argument, {"base": base, "base_arm": base_arm, "sft": sft})()


def base():
    """0.9 M parameters. Rows are short: of few tokens a mask predictor learns soonest from what is near."""
    c = default_config()
    c.model.update(dict(layers=4, width=128, heads=4, ffn=352, vocab_size=1024, max_length=256, rope_theta=1000.0))
    c.model.update(dict(qk_norm=True, tie_embeddings=True, init_std=0.05, dtype="float32"))
    c.objective.random_length_fraction = 0.0
    c.data.update(dict(sequence_length=64, holdout_fraction=0.02))
    c.train.update(dict(batch_size=16, steps=6000, log_every=100))
    c.optimizer.peak_learning_rate = 4e-3
    c.optimizer.schedule = "0:0 5%:1 70%:1 100%:0.1"
    c.evaluate.update(dict(every=1000, batches=16, draws=4))
    c.checkpoint.every = 1000
    return c


def base_arm():
    """The same but for objective and attention."""
    c = base()
    c.objective.name, c.model.causal = "autoregressive", True
    return c


def sft():
    """In an epoch one answer of each stretch trains; as many as fit share a row. Step 0 and all others are kept."""
    c = base()
    c.dialogues.update(dict(turns="drawn", bucket=32, too_long="truncate"))
    c.data.sequence_length = 256
    c.train.update(dict(batch_size=4, steps=2000))
    c.optimizer.peak_learning_rate = 2e-3
    c.optimizer.schedule = "0:0 5%:1 60%:1 100%:0.02"
    c.evaluate.update(dict(every=500, batches=64, draws=4))
    c.checkpoint.update(dict(every=500, keep=10))
    return c
