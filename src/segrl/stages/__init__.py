"""Ways of training: Lightning modules."""
