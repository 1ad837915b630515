"""Multi-gate mixture-of-experts ranking."""
