"""What the command's verbs do, a file each beside `options.py`, their arguments, and `calls.py`, which hands these on."""
