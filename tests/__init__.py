"""Tests of the whole: `make test`."""
