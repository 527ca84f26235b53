"""The door: the command, the recipes, and everything that starts processes. Nothing imports this package."""
