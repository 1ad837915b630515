"""Score and rank candidates with a trained model.

Begin in `ranker`, which reads an `artifact` folder and answers requests. `batch_scoring` scores the rows of a log.
"""
