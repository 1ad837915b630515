"""Commands about predictions and models that are there: each is run as `python -m pipelines.evaluation.NAME`."""
