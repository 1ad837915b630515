"""Infer a log's schema and draft settings (`init`), and describe the health of a data set (`inspect`).

In: Parquet files of a log; encoded rows of prepared features. Out: a settings file with marked guesses; health as plain
data for JSON. Begin with `guess.py` for `init` and with `data_health.py` for `inspect`.
"""
