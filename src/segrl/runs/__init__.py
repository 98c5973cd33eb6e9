"""What the commands share: configuration, refusals, a run's folder, training, evaluation, report."""
