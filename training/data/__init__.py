"""The data of training: questions as rows, supervised examples, and rewards by name."""
