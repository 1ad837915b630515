"""A model made smaller, or put into a format that other servers read."""
