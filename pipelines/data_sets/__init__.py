"""What the data sets have in common, and what is known of each."""
