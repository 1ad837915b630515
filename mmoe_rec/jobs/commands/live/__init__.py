"""The commands of features that live: what happens while a model serves, and what comes of it."""
