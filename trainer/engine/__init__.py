"""What samples from the policy: vLLM behind TRL's own engine class, and the proof that it follows the weights."""
