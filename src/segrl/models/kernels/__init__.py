"""What replaces or speeds up a part of transformers; README.md says what each file buys."""
