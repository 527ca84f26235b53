"""Teachers: weights and a context that score the policy's own answers, token by token (`algorithm: distil`).

`settings.py` is what a recipe says, `context.py` what a teacher reads and the policy does not, `weights.py` what is found
of their files before anything is loaded, `endpoint.py` how one that is served elsewhere is asked, `lesson.py` who teaches
which domain, `teachers.py` the models, one at a time, `distil.py` what the update makes of their log-probabilities, and
`recovery.py` the teacher that a guardrail's recovery has, under any algorithm.
"""
