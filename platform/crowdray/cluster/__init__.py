"""Conversion, training and batch-size measurement on a Ray cluster."""
