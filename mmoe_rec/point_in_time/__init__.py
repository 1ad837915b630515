"""Point-in-time lookups: events of keys and times of requests go in; what was known at these times comes out.

Begin with README.md, which follows one counter, and in `join`.
"""
