"""Reward terms: pure functions from an answer and its sample to a number; and their mixture."""
