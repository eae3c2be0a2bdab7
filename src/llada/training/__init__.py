"""Optimizer, step, checkpoints, metrics, loop."""
