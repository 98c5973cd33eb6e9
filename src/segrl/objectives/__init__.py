"""Equations of reinforcement learning and fine-tuning, as pure functions of tensors."""
