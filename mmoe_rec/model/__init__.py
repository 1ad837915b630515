"""The network: batches go in, logits of each task come out.

Begin in `mmoe`: embedding tables, experts, gates and towers. `layout` says which inputs the network reads, and `score`
combines predictions into one score.
"""
