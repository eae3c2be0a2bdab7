"""The one switch between the families: an objective by its configured name."""

from llada.objectives import autoregressive, diffusion

LOSSES = {"diffusion": diffusion.loss, "autoregressive": autoregressive.loss}
