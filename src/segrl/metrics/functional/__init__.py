"""Equations of the scores; pure functions of arrays."""
