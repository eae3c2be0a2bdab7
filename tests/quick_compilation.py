"""Variables with which tiny programs compile fast: for tests, and for the processes of the fault suite.

Compiling is most of the time there, and what is compiled runs for milliseconds: without LLVM's optimisations it takes
half as long, and half of that with the emitters that XLA had for fused operations before those of MLIR. Its passes are
the usual ones. One run in tests/training/test_loop.py has everything as users have it.
"""

DEFAULTS = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # Where in the source each operation of a program comes from: writing that down takes a twentieth of the time.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
