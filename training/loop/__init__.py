"""One round of training: sampling, log, validation, checkpoints, what is left for the next."""
