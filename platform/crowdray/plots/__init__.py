"""Pictures of data, training runs and predictions."""
