"""Grammars of completions: mask prompts to text and back; pure functions."""
