"""What things cost and how fast they are: `python -m tests.benchmarks.run`, from the project's root."""
