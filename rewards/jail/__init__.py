"""The two sides of the code jail: `warden` and `candidate` run inside, `remote` speaks to them, `confine` builds it."""
