"""The paper's ARM baseline at 7B (Table 5): grouped-query attention, a larger batch and its own learning rate.

llada train --config=experiments/arm_7b.py --workdir=DIR --config.data.source='text:/data/*.jsonl' \
    --config.data.tokenizer=/data/tokenizer.model --config.mesh.fsdp=256

Parameters: 6,834,851,840 in all, 5,798,858,752 without embeddings. Not matched to LLaDA 8B: see `llada_8b`.
"""

from llada.config import default_config


def get_config():
    """6 N = 34.8 GFLOP per token; 4,224 x 4,096 = 17.3 M tokens per step."""
    c = default_config()
    c.objective.name, c.model.causal, c.objective.random_length_fraction = "autoregressive", True, 0.0
    c.model.update(dict(layers=28, width=4096, heads=32, kv_heads=8, ffn=13_440, vocab_size=126_464, max_length=4096))
    c.model.remat = "full"
    c.data.sequence_length = 4096
    c.train.batch_size = 4224
    c.train.tokens = 2_300_000_000_000
    c.optimizer.peak_learning_rate = 4.2e-4
    c.optimizer.schedule = "0:0 10.48576G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025"
    c.evaluate.update(dict(every=1000, batches=1))
    c.checkpoint.update(dict(every=1000, keep=5))
    return c
