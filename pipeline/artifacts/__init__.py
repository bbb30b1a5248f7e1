"""The artifact store, without Luigi: folders, locks, child processes, manifests, source digests."""
