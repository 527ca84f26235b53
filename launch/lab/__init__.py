"""The lab: a world of five small domains, and a policy of under a million parameters.

`world` generates rows, `rewards` grades stories, `warm_start` builds the policy that `policy/` holds.
"""
