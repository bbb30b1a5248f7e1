"""From rollouts to questions: merges votes into candidates, chooses options, plans refreshes."""
