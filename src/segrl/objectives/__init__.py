"""Equations; pure tensors."""
