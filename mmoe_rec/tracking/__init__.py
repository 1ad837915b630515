"""Runs, metrics and the model registry: the only room that talks to MLflow."""
