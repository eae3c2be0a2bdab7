"""llada: pre-training large language diffusion models beside autoregressive ones, in JAX."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada.config import MeshConfig
    from llada.training.run import Run

__version__ = "0.1.0"

# With other values of these JAX settings the same seed gives other masks, and other results, than llada's commands.
_JAX_SETTINGS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


def load(
    workdir: str | os.PathLike, step: int | None = None, mesh: "MeshConfig | None" = None, dtype: str = "float32"
) -> "Run":
    """Open a trained workdir: config, parameters, tokenizer and model functions; see `load` of training/run.py.

    UserError if JAX's settings differ from the defaults that results depend on.
    """
    # Imported here: `import llada.errors`, which every command does first, must not wait for JAX.
    import jax

    from llada.errors import UserError
    from llada.training import run

    for name, default in _JAX_SETTINGS.items():
        if (value := getattr(jax.config, name, default)) != default:
            raise UserError(
                f"{name}={value}: llada computes with {default!r} only; call jax.config.update({name!r}, {default!r}) "
                f"first, or unset {name.upper()}"
            )
    return run.load(workdir, step, mesh, dtype)
