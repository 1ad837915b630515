"""What was known of a key at a moment."""
