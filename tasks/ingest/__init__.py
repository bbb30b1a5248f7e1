"""Gets the images of a dataset: sources, decoding, fingerprints, duplicates, and splits."""
