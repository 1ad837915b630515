"""The kinds of features: what they learn from a log, and the inputs that they make of rows."""
