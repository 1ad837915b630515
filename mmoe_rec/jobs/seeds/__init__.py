"""One setting trained with several seeds: what it is worth on average, and beside other settings."""
