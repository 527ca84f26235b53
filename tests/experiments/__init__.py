"""What training does, measured in real runs: `python -m tests.experiments.<name>`, from the project's root."""
