"""Shared by all tests: float32 products are float32 on every backend, so that one tolerance holds everywhere.

GPUs and TPUs otherwise round float32 operands to fewer bits.
"""

import jax

jax.config.update("jax_default_matmul_precision", "highest")
