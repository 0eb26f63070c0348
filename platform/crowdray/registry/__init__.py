"""The only floor that knows MLflow: tracked runs, the packaged counter, its versions in the registry."""
