"""What is minimised: the likelihood bound (diffusion) or the exact next-token loss (autoregressive)."""
