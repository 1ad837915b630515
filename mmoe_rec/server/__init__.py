"""The model server: HTTP requests go in, ranked candidates come out.

Begin in `app`, which answers requests like MLflow's server. `ranking_queue` joins concurrent requests to batches.
"""
