"""The jail for code that nobody has read. `client` is asked, `server` starts jails; the others run there, by bare names.

`supervisor` keeps one program, `program_side` answers for it, `test_side` asks it, `confine` builds the walls.
"""
