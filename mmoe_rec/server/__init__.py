"""The model server: it receives HTTP requests and replies with ranked candidates.

Begin in `app`, whose pages work like MLflow's server. `ranking_queue` joins concurrent calls into batches.
"""
