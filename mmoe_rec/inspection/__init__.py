"""Inspection: encoded rows -> mergeable sums -> the health of a data set, as numbers, in words and as a page.

`collect.collect` streams the splits of prepared features once, `health.health_of` turns the sums into plain data for
`health.json`, `findings.py` says in words what is suspicious, `terminal.py` and `page.py` show it.
"""
