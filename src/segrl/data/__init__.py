"""Files, or a seed, to samples and batches."""
