"""Evaluation: predictions of many tasks -> mergeable sums -> metrics with intervals -> comparisons with a verdict.

Results are dataclasses, which decide; the room `report` words them. `sums.measure` takes any part of the rows, parts
are merged in any order, and `summary.summarise` is called once on the total. `metrics/` has a class for each metric,
`intervals.py` says how sure a number is, and `comparison.decide` which of two models is better.
"""
