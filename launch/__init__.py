"""The command line, the recipes, and everything that starts processes. Nothing imports this package."""
