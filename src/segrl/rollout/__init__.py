"""The reinforcement learning step before the gradient: sampling and scoring."""
