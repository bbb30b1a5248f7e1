"""From rollouts to questions: candidates merged, options chosen, refreshes planned."""
