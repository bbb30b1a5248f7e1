"""What stages hand to one another: Parquet schemas and shards, manifests, seeds, decoded images."""
