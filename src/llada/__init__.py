"""llada: pre-training large language diffusion models beside autoregressive ones, in JAX."""

__version__ = "0.1.0"


def load(workdir, step=None):
    """Open a trained workdir: config, parameters, tokenizer and model functions; see `training/workdir.py`."""
    # Imported here so that `import llada.errors`, which every command does first, does not wait for JAX.
    from llada.training.workdir import load as load_run

    return load_run(workdir, step)
