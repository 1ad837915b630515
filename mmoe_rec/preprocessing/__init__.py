"""From a log to encoded rows, at any size: count, look up, encode; and further days."""
