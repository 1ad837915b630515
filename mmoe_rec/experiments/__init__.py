"""Settings, variants and seeds go in; a comparison with intervals comes out.

Begin in `compare`, which `runner` trains for.
"""
