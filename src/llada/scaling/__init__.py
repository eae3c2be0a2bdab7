"""Runs held against each other at matched FLOPs."""
