"""The autoregressive twin of LLaDA 1B: same shape, data, batch and learning rate (Table 5).

llada train --config=experiments/arm_1b.py --workdir=DIR --config.data.source='text:/data/*.jsonl' \
    --config.data.tokenizer=/data/tokenizer.model

Parameters: as llada_1b (1,486,972,928; 968,976,384 without embeddings), and 5634 is one override away there too.
"""

from llada.config import default_config


def get_config():
    """6 N = 5.81 GFLOP per token."""
    c = default_config()
    c.objective.name, c.model.causal, c.objective.random_length_fraction = "autoregressive", True, 0.0
    c.model.update(dict(layers=22, width=2048, heads=32, kv_heads=4, ffn=5632, vocab_size=126_464, max_length=4096))
    c.model.remat = "full"
    c.data.sequence_length = 4096
    c.train.batch_size = 1280
    c.train.tokens = 2_300_000_000_000
    c.optimizer.peak_learning_rate = 4e-4
    c.optimizer.schedule = "0:0 10.48576G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025"
    c.evaluate.update(dict(every=1000, batches=1))
    c.checkpoint.update(dict(every=1000, keep=5))
    return c
