"""Scores the rows of a log, part by part."""
