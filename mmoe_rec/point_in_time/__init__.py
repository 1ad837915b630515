"""Point-in-time lookups, which return the events of a key that were available at the time of a request.

Start with docs/explanation/point-in-time.md, which follows one counter, and then read `join`.
"""
