"""Models on the same rows: what is written and said of them, and which one is better."""
