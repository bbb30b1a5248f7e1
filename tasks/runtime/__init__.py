"""How a stage runs as a process: command line, errors, Ctrl-C, progress, memory, the machine."""
