"""The sandbox for untrusted code. `client` is the API, `server` forks supervisors; the other files run in those.

`supervisor` runs one program, `confine` isolates its process, `program_side` and `test_side` are the two ends between a
program and its tests.
"""
