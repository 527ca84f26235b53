"""What is watched while a run learns: entropy, the damage to other domains, signs of shortcuts."""
