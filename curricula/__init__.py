"""Numbers in, decisions out: which domain and which prompt is trained on next.

Schedulers decide the mixture, pools select prompts, the curriculum draws. No tensor library, no trainer, no tracker: all
runs on plain numbers and can be replayed offline on a saved run.
"""
