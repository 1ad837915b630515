"""The server's log of requests and what it replied: Parquet files, one row for each candidate of a reply."""
