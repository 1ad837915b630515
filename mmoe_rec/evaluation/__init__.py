"""Evaluate models: turn predictions and labels into metrics with intervals, comparisons and reports.

`evaluate` measures a registered model, and `prediction_files` measures predictions in files. Both compute `sums` for
each user. `summary` turns the sums into metrics, and `comparison` turns them into a verdict. `metrics/` has a class for
each metric.
"""
