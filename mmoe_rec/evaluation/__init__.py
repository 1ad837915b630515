"""Measure models: predictions and labels go in; metrics with intervals, comparisons and reports come out.

`evaluate` measures a registered model and `prediction_files` predictions in files. Both give `sums` of each user, which
`summary` turns into metrics and `comparison` into a verdict. `metrics/` has a class for each metric.
"""
