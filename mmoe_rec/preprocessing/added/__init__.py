"""Files that a log has got since it was built from: features, and tables of models, that take them in."""
