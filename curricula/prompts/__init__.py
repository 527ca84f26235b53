"""Which prompts of a domain are practised: what is known of each, and who is next."""
