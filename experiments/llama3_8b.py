"""LLaMA3 8B as Table 5 lists it: an ARM whose blocks have exactly the parameters of LLaDA 8B's.

llada train --config=experiments/llama3_8b.py --workdir=DIR --config.data.source='text:/data/*.jsonl' \
    --config.data.tokenizer=/data/tokenizer.model --config.mesh.fsdp=256

Parameters: 8,028,164,096 in all, 6,979,588,096 without embeddings, with the paper's vocabulary of 128,000; with the
released model's, --config.model.vocab_size=128256, 8,030,261,248. Trained here by LLaDA's recipe, not by LLaMA3's.
"""

from llada.config import default_config


def get_config():
    """6 N = 41.9 GFLOP per token."""
    c = default_config()
    c.objective.name, c.model.causal, c.objective.random_length_fraction = "autoregressive", True, 0.0
    c.model.update(dict(layers=32, width=4096, heads=32, kv_heads=8, ffn=14_336, vocab_size=128_000, max_length=4096))
    c.model.remat = "full"
    c.data.sequence_length = 4096
    c.train.batch_size = 1280
    c.train.tokens = 2_300_000_000_000
    c.optimizer.peak_learning_rate = 4e-4
    c.optimizer.schedule = "0:0 10.48576G:1 1.2T:1 1.2T:0.25 2T:0.25 2.3T:0.025"
    c.evaluate.update(dict(every=1000, batches=1))
    c.checkpoint.update(dict(every=1000, keep=5))
    return c
