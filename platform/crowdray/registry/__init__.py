"""MLflow: tracked runs, packaged counters and registered versions."""
