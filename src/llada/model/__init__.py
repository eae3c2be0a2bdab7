"""The mask predictor and its autoregressive twin: one Transformer."""
