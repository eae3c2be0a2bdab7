"""Text to rows of token ids to batches: sources, tokenizer, rows."""
