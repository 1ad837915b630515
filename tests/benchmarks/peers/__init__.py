"""torch-rechub and DeepCTR-Torch, in an environment of their own, on rows that this project encoded."""
