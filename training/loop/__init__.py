"""One round of training: sampling, log, validation, checkpoints, and the state for the next."""
