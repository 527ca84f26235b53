"""What samples from the policy: vLLM behind TRL's own engine class, and the check that it follows the weights."""
