"""The model server: it receives HTTP requests and replies with ranked candidates.

Begin in `app`, which has the same endpoints and reply formats as MLflow's server. `ranking_queue` combines concurrent
calls into batches.
"""
