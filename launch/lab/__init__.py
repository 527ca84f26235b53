"""The lab: a world of five small domains, a policy of under a million parameters, and what is measured on them.

`world` generates rows, `rewards` grades stories, `tokenizer` and `warm_start` build the policy that `policy/` holds.
"""
