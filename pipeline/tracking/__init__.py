"""Where a run's numbers go: the ledger (the truth), W&B and the console (views of it). Knows nothing of training."""
