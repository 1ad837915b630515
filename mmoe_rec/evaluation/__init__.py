"""Evaluation: predictions of many tasks -> mergeable sums -> metrics with intervals -> tables and figures.

A batch job calls `sums.measure` on each part of the rows, merges the results in any order, and calls
`summary.summarise` once on the total.
"""
