"""In-context learning on two CPU cores: LLaDA and an ARM of the same size on the same documents, in the same order.

llada train --config=experiments/in_context.py:llada --workdir=runs/in_context/llada-0 \
    --config.data.source=text:DATA/train.jsonl --config.data.holdout_source=text:DATA/held_out.jsonl
llada lm_eval --workdir=runs/in_context/llada-0 --tasks=in_context_choice_8 --include_path=DATA

DATA is what experiments/in_context_data.py writes; launch/quickstart_in_context.sh does all of it. `arm` is the ARM's.
"""

from llada.config import default_config, pick


def get_config(argument="llada"):
    """`llada` or `arm`: 0.1 M parameters. Two layers, since what is copied has to be looked up by what stood before it.

    A document sees itself only, and none is longer than a row; so an example is where it was in training.

    In pilots of up to 9,000 steps LLaDA had not learned to look up what stands behind a letter: these settings are a
    beginning.
    """
    c = default_config()
    c.objective.name = pick(argument, {"llada": "diffusion", "arm": "autoregressive"})
    c.model.causal = argument == "arm"
    # The 52 letters, 256 bytes and controls; a larger table would merge a letter with its capital.
    c.model.update(dict(layers=2, width=64, heads=2, ffn=128, vocab_size=318, max_length=80, rope_theta=1000.0))
    c.model.update(dict(qk_norm=True, tie_embeddings=True, init_std=0.12, dtype="float32"))
    # Of a few dozen tokens a smaller share is none, and 1/p of the rare ones would be mostly noise.
    c.objective.update(dict(random_length_fraction=0.0, eps=0.05, block_cross_document_attention=True))
    c.data.sequence_length = 80
    c.train.update(dict(batch_size=32, steps=3000, log_every=50))
    c.optimizer.update(dict(peak_learning_rate=3e-3, schedule="0:0 5%:1 50%:1 100%:0.02"))
    c.evaluate.update(dict(every=0, batches=4, draws=4))
    c.checkpoint.update(dict(every=500, keep=20))
    return c
