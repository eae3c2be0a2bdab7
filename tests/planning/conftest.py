"""libtpu for the tests: from `launch/test.sh`, which keeps it out of .venv, or wherever it is installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / ".venv" / "tpu"


@pytest.fixture(scope="session")
def libtpu():
    """Skips by name where there is none, as on machines that are not Linux."""
    if importlib.util.find_spec("libtpu") is None and BESIDE.is_dir():
        sys.path.append(str(BESIDE))
        importlib.invalidate_caches()
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'llada-jax[tpu]'")
