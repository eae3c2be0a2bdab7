"""Supervised fine-tuning as LLaDA 8B Instruct had it (section 2.3, appendix B.1).

llada train --config=experiments/sft.py --init=WORKDIR_OR_HF_DIR --workdir=DIR \
    --config.data.source='dialogues:/data/*.jsonl'

Family, model and tokenizer are those of --init, trained here or imported. For other data two keys matter:
data.sequence_length is at most the model's model.max_length, and dialogues.bucket=N packs examples into rows instead of
padding each to a row.
"""

from llada.config import default_config


def get_config():
    """The paper's: 3 epochs of 4.5 M pairs, 256 a step; |EOS| behind short answers is part of them."""
    c = default_config()
    c.model.max_length = 4096  # of the published model; --init has the last word
    c.objective.random_length_fraction = 0.0
    c.objective.normalization = "sequence"
    c.dialogues.update(dict(turns="drawn", padding="eos"))
    c.data.source = "dialogues:data/*.jsonl"
    c.data.update(dict(sequence_length=4096, holdout_fraction=0.001))
    c.train.update(dict(batch_size=256, epochs=3.0))
    c.optimizer.update(dict(peak_learning_rate=2.5e-5, weight_decay=0.1))
    c.optimizer.schedule = "0:0 50it:1 90%:1 100%:0.1"
    c.evaluate.update(dict(every=1000, batches=4, draws=8))
    c.checkpoint.update(dict(every=1000, keep=2))
    return c
