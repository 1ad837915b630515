"""Network that turns batches into logits of each task.

Read `mmoe` first, with embedding tables, experts, gates and towers. `model_layout` lists the inputs of the network, and
`score` combines predictions into one score.
"""
