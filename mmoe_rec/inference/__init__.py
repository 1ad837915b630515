"""Rank candidates: a trained model and requests go in, scores and predictions come out.

Begin in `ranker`, which reads an `artifact` folder and answers requests. `batch_scoring` scores the rows of a log.
"""
