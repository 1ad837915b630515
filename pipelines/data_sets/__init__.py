"""What the commands for data sets are made of: their logs, and the baselines that the quickstart shows."""
