"""Metrics of predictions in Parquet files, wherever they come from."""
