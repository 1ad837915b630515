"""From Parquet files to settings that a person can check: what columns hold and mean, and which features they make."""
