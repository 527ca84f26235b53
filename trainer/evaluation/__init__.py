"""Held-out evaluation: per-item scores, and statistics with intervals."""
