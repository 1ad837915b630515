"""What happened since training: journal, learning, request log, outcomes, refresh, skew check."""
