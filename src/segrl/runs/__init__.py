"""Code that the commands share: configuration, error messages, run folders, training, evaluation, reports."""
