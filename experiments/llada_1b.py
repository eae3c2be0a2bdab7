"""LLaDA 1B of the paper's scaling study (Table 5).

llada train --config=experiments/llada_1b.py --workdir=DIR --config.data.source='text:/data/*.jsonl' \
    --config.data.tokenizer=/data/tokenizer.model

Parameters: 1,486,972,928 in all, 968,976,384 without embeddings. The paper prints an FFN of 5634, very probably a typo
for 5632 = 44 x 128; with --config.model.ffn=5634 they are 1,487,243,264 and 969,246,720.
"""

from llada.config import BEST_OBJECTIVE, default_config, pick


def get_config(argument="paper"):
    """`paper`, or `best`: the paper's objective, or the one that our own study found best (docs/objectives.md).

    6 N = 5.81 GFLOP per token; 2.3e12 tokens are 438,690 steps of 1,280 x 4,096.
    """
    c = default_config()
    c.objective.update(pick(argument, {"paper": {}, "best": BEST_OBJECTIVE}))
    c.model.update(dict(layers=22, width=2048, heads=32, kv_heads=4, ffn=5632, vocab_size=126_464, max_length=4096))
    c.model.remat = "full"
    c.data.sequence_length = 4096
    c.train.batch_size = 1280
    c.train.tokens = 2_300_000_000_000
    # Two plateaus (appendix B.2): 2,000 steps of warm-up, 4e-4 to 1.2 T tokens, 1e-4 to 2.0 T, then down to 1e-5.
    c.optimizer.peak_learning_rate = 4e-4
    c.optimizer.schedule = "0:0 10.48576G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025"
    c.evaluate.update(dict(every=1000, batches=1, draws=8))
    c.checkpoint.update(dict(every=1000, keep=5))
    return c
