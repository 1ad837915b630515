"""Commands that measure what was predicted."""
