"""What the folder of an exported model says to somebody who has nothing but it."""

from __future__ import annotations

from typing import Any

_TEXT = """# {model}, in ONNX

`model.onnx` predicts {predictions}, and gives the one score to rank by.

It takes a matrix with a row for each candidate. mmoe_rec wrote it, and has checked it against itself. It runs wherever
ONNX does, such as in onnxruntime (the packages `onnxruntime` and `safetensors`):

```python
import onnxruntime
from safetensors.numpy import load_file

example = load_file("example.safetensors")
session = onnxruntime.InferenceSession("model.onnx")
predictions, log_score, score = session.run(None, {{"inputs": example["inputs"]}})
assert abs(predictions - example["predictions"]).max() < 1e-5
```

- `inputs`: (candidates, {width}) float32. `inputs.json` lists its columns, from `first` up to but without `end`.
  - A name with a `table` is an embedding: the row of an id in that table of `tables.safetensors`. With `many` it is the
    mean of the rows of several ids, and zeros where there is none.
  - A name without one is a number, as the model's features give it (standardised, for most kinds).
- `predictions`: (candidates, {outputs}) {dtype}, columns {predictions}.{outcomes}
- `log_score`: (candidates,) float64, the sum of each task's weight times the log of its prediction; `score`: its
  exponential. Rank by `log_score`, which is exact where `score` is too small or too large for a number.

Which row an id has, and what a number is, follows from the model's features: the folder `features` of the model that
this was made of, which `mmoe_rec.features.pipeline.FeaturePipeline` reads. Inputs made with other features, even of the
same names, mean something else (these have the fingerprint `{fingerprint}`).
"""


def readme(about: dict[str, Any]) -> str:
    """The text for what `inputs.json` holds."""
    predictions = about["outputs"]["predictions"]
    tasks = about["outputs"]["log_score"]["weights"]
    outcomes = [name for name in predictions["columns"] if name not in tasks]
    both = " The last of them: the probability of two together, their product." if outcomes else ""
    return _TEXT.format(
        model=about["model"],
        predictions=", ".join(f"`{name}`" for name in predictions["columns"]),
        width=about["inputs"]["width"],
        outputs=len(predictions["columns"]),
        dtype=predictions["dtype"],
        outcomes=both,
        fingerprint=about["fingerprint"],
    )
