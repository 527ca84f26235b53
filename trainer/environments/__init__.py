"""Domains that act: tools are called, environments answer, and the policy goes on, over several turns.

`calls.py` is one instance of an environment and what is asked of it, `acting.py` what a domain says of its own, `wording.py`
how turns become tokens and back. `threads.py` and `processes.py` are where instances live; `conversation.py` leads the
episodes of one batch from turn to turn, `episodes.py` is what a trainer holds of all this, and `counts.py` what it logs.
"""
