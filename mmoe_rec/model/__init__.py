"""The multi-gate mixture of experts: tables, bottom, experts, gates, towers and the fused score."""
