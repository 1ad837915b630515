"""The quickstart, `python -m pipelines.quickstart`, and the baselines that it shows."""
