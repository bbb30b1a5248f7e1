"""The artifact store, free of Luigi: folders, locks, child processes, manifests, sources."""
