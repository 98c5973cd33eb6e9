"""Read samples from files or generate them from a seed, and collate them to batches."""
