"""Whole files of small models, to be spoilt: exports of a LLaDA and of an ARM, and a tokenizer. Random weights."""

import json
from pathlib import Path

import jax
import numpy as np

from llada.config import default_config, from_config_dict, to_dict
from llada.data.tokenizer_training import train_tokenizer
from llada.interop.export import export
from llada.model import transformer
from llada.training.leaves import create, finish


class Models:
    """`exports`: their directories; `tokenizer`: the content of a tokenizer.model."""

    def __init__(self, folder: Path):
        """Write them, unless an earlier process has."""
        self.exports = [folder / name for name in ("llada", "arm")]
        model = folder / "tokenizer.model"
        if not model.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer = train_tokenizer(
                ["the cat sees the dog .\ndef f():\n    return 1\n" * 30], 300, model
            ).content
        self.tokenizer = model.read_bytes()
        for path, causal in zip(self.exports, (False, True), strict=True):
            if not path.exists():
                self._write(path, causal)

    def _write(self, path: Path, causal: bool) -> None:
        c = default_config()
        c.model.update(dict(layers=2, width=16, heads=2, ffn=24, vocab_size=300, max_length=64, dtype="float32"))
        c.model.causal, c.objective.name = causal, "autoregressive" if causal else "diffusion"
        c.objective.random_length_fraction = 0.0
        c.data.sequence_length, c.train.steps = 64, 4
        config = from_config_dict(c)
        workdir = path.with_name(f"{path.name} workdir")
        leaves, rng = create(workdir, config, self.tokenizer), np.random.default_rng(7)
        for keys, shape in jax.tree.leaves_with_path(transformer.abstract_parameters(config.model)):
            values = 0.1 * rng.standard_normal(shape.shape)
            leaves[".".join(str(key.key) for key in keys)].write(values.astype(np.float32)).result()
        finish(workdir, leaves)
        (workdir / "tokenizer.model").write_bytes(self.tokenizer)
        (workdir / "config.json").write_text(json.dumps(to_dict(config)))
        export(workdir, path, shard_bytes=30_000)
