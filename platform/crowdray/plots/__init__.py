"""Figures of datasets, training runs and predictions."""
