"""Events after training: events and requests of a server go in; later features, labels and models come out.

Begin in `journal`, which stores events; `server/models.py` updates a served model by them. `request_log` and
`label_join` make labeled rows of answered requests, `refresh` trains on them, and `skew` scores them again.
"""
