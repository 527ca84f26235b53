"""Start the warden: a script is compiled at every start, a module only once, so this says as little as possible."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])

import warden

warden.main()
