"""Hyperparameter search with Optuna on Ray Tune."""
