"""The training loop for any modules with losses, and its configuration, checkpoints, optimizer and loggers."""
