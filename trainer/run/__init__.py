"""What a run leaves behind: its folder, records, checkpoints' callbacks, trackers."""
