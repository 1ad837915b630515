"""Compare settings over several seeds: train variants and report differences with confidence intervals.

Start reading in `compare`. `runner` trains the variants, `tuning` and `importance` search for variants.
"""
