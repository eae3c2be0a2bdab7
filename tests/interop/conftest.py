"""Workdirs of small models of every kind, as `llada import` would leave them: random weights, step 0."""

import json

import jax
import numpy as np
import pytest

from llada.config import default_config, from_config_dict, to_dict
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer_training import train_tokenizer
from llada.model import transformer
from llada.training.leaves import create, finish

V = 320
SHAPES = {
    "MHA": {},
    "GQA": dict(kv_heads=2),
    "tied": dict(tie_embeddings=True),
    "GQA, tied, qk-norm": dict(kv_heads=2, tie_embeddings=True, qk_norm=True),
}


@pytest.fixture(params=list(SHAPES))
def shape(request) -> dict:
    """Changes to the model: one kind of attention and head after the other."""
    return SHAPES[request.param]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    text = "the cat sees the dog .\ndef main():\n    return 'naïve'\n" * 30
    return train_tokenizer([text], V - 8, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def build(tokenizer, tmp_path_factory):
    """`build(causal=True, kv_heads=2, ...)`: the path of a workdir; the same arguments give the same one."""
    made = {}

    def make(causal: bool = False, **changes):
        key = (causal, *sorted(changes.items()))
        if key in made:
            return made[key]
        c = default_config()
        c.model.update(dict(layers=3, width=32, heads=4, ffn=48, vocab_size=V, max_length=64, dtype="float32"))
        c.model.update(dict(init_std=0.3, causal=causal) | changes)
        c.objective.name = "autoregressive" if causal else "diffusion"
        c.data.sequence_length, c.train.steps = 64, 4
        config = from_config_dict(c)
        workdir = tmp_path_factory.mktemp("model") / "model"
        rng = np.random.default_rng(7)

        def draw(path, shape):
            """As `transformer.init` would, but for norms: those of one would hide one left out or put elsewhere."""
            name = str(path[-1].key)
            if "norm" in name:
                return (1 + 0.1 * rng.standard_normal(shape.shape)).astype(shape.dtype)
            scale = 1 / np.sqrt(2 * config.model.layers) if name in ("output", "down") else 1
            return (scale * config.model.init_std * rng.standard_normal(shape.shape)).astype(shape.dtype)

        # In NumPy: compiling the initialiser of every kind takes longer than most tests here.
        params = jax.tree_util.tree_map_with_path(draw, transformer.abstract_parameters(config.model))
        leaves = create(workdir, config, tokenizer.content)
        for name, leaf in leaves.items():
            group, _, last = name.rpartition(".")
            leaf.write(np.asarray((params[group] if group else params)[last])).result()
        finish(workdir, leaves)
        (workdir / "tokenizer.model").write_bytes(tokenizer.content)
        (workdir / "config.json").write_text(json.dumps(to_dict(config)))
        return made.setdefault(key, workdir)

    return make
