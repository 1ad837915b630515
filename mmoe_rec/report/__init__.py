"""The report: what was measured, as pages, figures and terminal tables.

Pages are Jinja2 templates (`templates/`, one style sheet), rendered by `pages.render`; figures are matplotlib's in one
style (`style.py`). `health.py` is the page of a data set's health, `terminal.py` the same in short; `evaluation.py`
that of models' metrics, differences and verdicts. No other stage imports Jinja2 or matplotlib.
"""
