"""llada: pre-training large language diffusion models beside autoregressive ones, in JAX."""

__version__ = "0.1.0"

# With other values of these JAX settings the same seed gives other masks, and other results, than llada's commands.
_JAX = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


def load(workdir, step=None, **options):
    """Open a trained workdir: config, parameters, tokenizer and model functions; see `training/run.py`.

    UserError if JAX's settings differ from the defaults that results depend on.
    """
    # Imported here: `import llada.errors`, which every command does first, must not wait for JAX.
    import jax

    from llada.errors import UserError
    from llada.training.run import load as load_run

    for name, wanted in _JAX.items():
        if (value := getattr(jax.config, name, wanted)) != wanted:
            raise UserError(
                f"{name}={value}: llada computes with {wanted!r} only; call jax.config.update({name!r}, {wanted!r}) "
                f"first, or unset {name.upper()}"
            )
    return load_run(workdir, step, **options)
