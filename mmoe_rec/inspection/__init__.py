"""Inspection: encoded rows -> mergeable sums -> the health of a data set, as numbers and in words.

`sums.collect` streams the splits of prepared features once, `health.inspect` turns the sums into plain data for
`health.json`, and `findings.py` says in words what is suspicious. `mmoe_rec.report` shows it.
"""
