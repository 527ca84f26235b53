"""The trunk: one thin subclass of TRL's GRPOTrainer, and the ledgers around it. A prompt becomes a gradient here."""
