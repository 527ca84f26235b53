"""Held-out sets, scored item by item, and what is said of them with intervals."""
