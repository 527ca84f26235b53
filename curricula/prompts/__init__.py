"""Prompt selection: the estimated pass rate of each prompt of a domain, and which are drawn next."""
