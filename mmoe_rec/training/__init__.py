"""From encoded rows to the best state of a model, on one process or many."""
