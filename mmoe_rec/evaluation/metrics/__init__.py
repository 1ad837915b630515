"""The metrics of an evaluation, one class a metric, one file a family; `registered.METRICS` lists them."""
