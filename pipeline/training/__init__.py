"""The training loop and what it owns: steps, optimizer, schedule, checkpoints, ranks, signals, evaluation."""
