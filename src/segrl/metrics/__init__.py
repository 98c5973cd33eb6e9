"""Scores of masks and maps against the truth, per sample and per set."""
