"""The model server: `/invocations` as MLflow's, with limits, batches of waiting calls, metrics, reload and workers."""
