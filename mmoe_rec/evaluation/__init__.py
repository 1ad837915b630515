"""Evaluation: predictions of many tasks -> sums per user -> metrics with intervals -> comparisons with a verdict.

Results are dataclasses, which decide; the room `report` words them. `sums.measure` adds up rows, and
`summary.summarise` makes metrics of the sums. `metrics/` has a class for each metric, `intervals.py` says how sure a
number is, and `comparison.decide` which of two models is better.
"""
