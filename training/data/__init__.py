"""What training reads: questions as rows, supervised examples, rewards by name."""
