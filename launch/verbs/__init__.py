"""What the command's verbs do, a file each; `train` and `launch` stand beside this folder."""
