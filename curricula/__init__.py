"""Numbers in, decisions out: which domain and which prompt the policy practises next.

Ledgers remember, schedulers decide, the curriculum draws. Nothing here knows a tensor library, a trainer or a
tracker; everything runs on plain numbers and can be replayed offline on a saved run.
"""
