"""One recipe on many processes: this machine's ranks, a Slurm job, a Ray cluster and its rollout workers."""
