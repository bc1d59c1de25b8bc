"""Hyperparameter search: space, study folder and storage, trials in rungs, confirmation with fresh seeds, report."""
