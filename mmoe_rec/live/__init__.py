"""Data after training: store events, label logged requests, refresh models and check for skew.

Begin in `journal`, which stores the events that servers accept. `server/models.py` updates a served model with these
events. `request_log` records ranked requests, and `label_join` turns them into labeled training rows.
"""
