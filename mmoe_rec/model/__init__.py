"""Network that computes the logits of all tasks for the rows of a batch.

Read `mmoe` first, which puts the network together. `model_layout` lists the network's inputs and outputs, and `score`
combines the predictions of all tasks into one score.
"""
