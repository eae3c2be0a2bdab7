"""The reversal curse on two CPU cores: LLaDA and an ARM of the same size on the same statements, in the same order.

llada train --config=experiments/reversal.py:facts --workdir=runs/reversal/facts/llada-0 \
    --config.data.source=dialogues:DATA/train.jsonl --config.data.holdout_source=dialogues:DATA/held_out.jsonl \
    --config.dialogues.template=DATA/statement.jinja
llada evaluate --task=reversal --workdir=runs/reversal/facts/llada-0 --facts=DATA/asked.json \
    --forward='{first} is {second}.' --backward='{second} is {first}.'

DATA is what experiments/reversal_data.py writes; launch/quickstart_reversal.sh does all of it. `facts`, `couplets` and
`dictionary` are LLaDA's; `facts_arm` and so on the ARM's.
"""

from llada.config import default_config, pick


def get_config(argument="facts"):
    """The kind of pairs, with `_arm` behind it for the ARM."""
    kinds = {"facts": facts, "couplets": couplets, "dictionary": dictionary}
    kind, arm = argument.removesuffix("_arm"), argument.endswith("_arm")
    c = pick(kind, kinds)()
    if arm:
        c.objective.name, c.model.causal = "autoregressive", True
    return c


def facts():
    """0.7 M parameters. A statement is an example of its own, padded to 12 tokens; four share a row.

    The learning rate comes down over half of the run: names are remembered then. With 3,000 steps LLaDA knew every
    fact and answered fewer backward questions in a pilot; so it did with a dropout of 0.1, and with three people whose
    film is stated both ways for each that is asked, in 3,000 steps.
    """
    c = default_config()
    c.model.update(dict(layers=3, width=128, heads=4, ffn=352, vocab_size=800, max_length=48, rope_theta=1000.0))
    c.model.update(dict(qk_norm=True, tie_embeddings=True, init_std=0.05, dtype="float32"))
    # Of a dozen tokens a smaller share is none, and 1/p of the rare ones would be mostly noise.
    c.objective.update(dict(random_length_fraction=0.0, eps=0.05))
    c.data.sequence_length = 48
    c.dialogues.update(dict(bucket=12, turns="each"))
    c.train.update(dict(batch_size=16, steps=2000, log_every=100))
    c.optimizer.update(dict(peak_learning_rate=4e-3, schedule="0:0 5%:1 50%:1 100%:0.02"))
    c.evaluate.update(dict(every=0, batches=16, draws=4))
    c.checkpoint.update(dict(every=500, keep=1))
    return c


def couplets():
    """A character is a token: the 2,473 of the Tang couplets, 256 bytes, controls; a larger table would merge pairs."""
    c = facts()
    c.model.vocab_size = 2760
    c.dialogues.bucket = 8
    return c


def dictionary():
    """Words in pieces."""
    c = facts()
    c.model.vocab_size = 2000
    return c
