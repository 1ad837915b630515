"""Draft settings from a log (`init`), or report the health of its data (`inspect`).

Start reading in `infer_schema` for `init` and in `data_health` for `inspect`.
"""
