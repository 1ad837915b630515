"""Inspection: encoded rows -> mergeable sums -> the health of a data set, as numbers and in words.

`sums.collect` streams the splits of prepared features once, `health.inspect` turns the sums into plain data for
`health.json`; `findings.py` says in words what is suspicious, `advice.py` what to change, and `forecast.py` how small a
gain the test rows can show. `mmoe_rec.report` shows it.
"""
