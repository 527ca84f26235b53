"""Experts become one model: their weights merged tensor by tensor, and who of them changed the same ones.

`merge.merge` makes a folder for `from_pretrained`, `shared.shared_parameters` measures. No model is built for either, but
where an adapter is read. Nothing here scores what comes out: that is `launch/verbs/merge.py`.
"""
