"""LLaDA 8B (Table 5): as many parameters as LLaMA3 8B, with full multi-head attention and a narrower FFN.

llada train --config=experiments/llada_8b.py --workdir=DIR --config.data.source='text:/data/*.jsonl' \
    --config.data.tokenizer=/data/tokenizer.model --config.mesh.fsdp=256

Parameters: 8,015,581,184 in all, 6,979,588,096 without embeddings.
"""

from llada.config import BEST_OBJECTIVE, default_config, pick


def get_config(argument="paper"):
    """`paper`, or `best`: the paper's objective, or the one that our own study found best (docs/objectives.md).

    6 N = 41.9 GFLOP per token; 2.3e12 tokens cost 9.63e22 FLOPs in that accounting.
    """
    c = default_config()
    c.objective.update(pick(argument, {"paper": {}, "best": BEST_OBJECTIVE}))
    c.model.update(dict(layers=32, width=4096, heads=32, ffn=12_288, vocab_size=126_464, max_length=4096))
    c.model.remat = "full"
    c.data.sequence_length = 4096
    c.train.batch_size = 1280
    c.train.tokens = 2_300_000_000_000
    c.optimizer.peak_learning_rate = 4e-4
    c.optimizer.schedule = "0:0 10.48576G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025"
    c.evaluate.update(dict(every=1000, batches=1, draws=8))
    c.checkpoint.update(dict(every=1000, keep=5))
    return c
