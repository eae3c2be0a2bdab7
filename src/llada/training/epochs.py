"""Runs whose length is given in epochs: how many steps they are is known once their rows are prepared."""

import dataclasses
from pathlib import Path

import jax

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada import processes
from llada.config import Config
from llada.training import workdir as workdir_lib
from llada.training.progress import TerminalProgress
from llada.training.stopping import stop_signals


def with_steps(config: Config, workdir: Path, allow_return: bool) -> Config:
    """The config with the steps that its epochs are, for which its rows are prepared, if need be."""
    path = workdir / "config.json"
    old = config_lib.load(path).steps if path.exists() else 0  # config.json stays true until the steps are known
    counted = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=None, steps=old or 1))
    log = TerminalProgress(counted, quiet=not processes.is_first()).log
    mesh = mesh_lib.make(counted.mesh)
    mesh_lib.check(counted, mesh)
    workdir_lib.require_source(workdir, counted)
    with jax.set_mesh(mesh), stop_signals() as received, workdir_lib.held(workdir):
        _, counted = workdir_lib.claim(workdir, counted, allow_rate_jump=True, allow_return=allow_return)
        tokenizer, corpus = workdir_lib.prepare(workdir, counted, log, received.check)
    assert config.train.epochs is not None
    steps = corpus.batches(counted, tokenizer).steps(config.train.epochs)
    return dataclasses.replace(counted, train=dataclasses.replace(counted.train, steps=steps))
