"""Records of runs: history, pictures, checkpoints, alarms, provenance, MLflow."""
