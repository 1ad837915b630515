"""The report: every sentence, table, figure, page and file about what was measured.

`sentences.py` and `findings.py` put an evaluation into words, `tables.py` onto a terminal, `evaluation.py` onto a page
and into files; `trainings.py` is of several trainings, `health.py` of a data set. Pages are Jinja2 templates
(`templates/`: one form, one style sheet), rendered by `pages.py`; figures are matplotlib's in one style. No other stage
imports either.
"""
