"""What every stage's process needs: command line, settings, errors, Ctrl-C, progress, memory."""
