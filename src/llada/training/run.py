"""A trained model, ready to be used: `llada.load(workdir)`."""

from pathlib import Path
from typing import NamedTuple

import jax

from llada import accounting
from llada.config import Config
from llada.data.tokenizer import Tokenizer
from llada.model import transformer


class Run(NamedTuple):
    """Config, parameters, tokenizer, step and mesh, with the model's functions; `workdir` is where it comes from."""

    config: Config
    params: transformer.Parameters
    tokenizer: Tokenizer
    step: int
    mesh: jax.sharding.Mesh
    workdir: Path | None = None

    def __repr__(self) -> str:
        """One line, without the parameters."""
        count = accounting.parameters(self.config.model).total
        return f"Run({self.config.objective.name}, {count:,} parameters, step {self.step}, workdir={self.workdir})"

    def hidden(self, tokens_BL, lengths_B=None):
        """Hidden states of the model: see `transformer.hidden`."""
        return transformer.hidden(self.config.model, self.params, tokens_BL, lengths_B)

    def logits(self, tokens_BL, lengths_B=None):
        """`logits_BLV`, float32: see `transformer.logits`."""
        return transformer.logits(self.config.model, self.params, tokens_BL, lengths_B)

    def generate(self, prompt: str = "", **options) -> str:
        """The text that continues `prompt`; options as in `generation.Request`, such as gen_length, temperature, seed.

        UserError for what the model or its context cannot do.
        """
        return self._generated(prompt=prompt, **options)

    def infill(self, text: str, **options) -> str:
        """`text` with its marks [MASK:N] filled by N tokens each; options as in `generation.Request`."""
        return self._generated(infill=text, **options)

    def log_likelihood(self, prompt: str, answer: str, **options):
        """`likelihood.LogLikelihood` of `answer` after `prompt`, in nats; options as in `LikelihoodConfig`.

        Spaces that end the prompt count to the answer: see `canvas.encode_pair`.
        """
        from llada.inference import canvas, likelihood  # sampling and scoring are not needed to train

        pair = likelihood.Pair(*canvas.encode_pair(self.tokenizer, prompt, answer))
        settings = likelihood.LikelihoodConfig(**options)
        with jax.set_mesh(self.mesh):
            return likelihood.log_likelihoods(self.config.model, self.params, [pair], self.tokenizer.special, settings)[
                0
            ]

    def _generated(self, **request) -> str:
        from llada.inference import generation

        with jax.set_mesh(self.mesh):
            requests = [generation.Request(**request)]
            return generation.generate(self.config, self.params, self.tokenizer, requests)[0].text
