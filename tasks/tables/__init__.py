"""The Parquet tables between stages: schemas, shards, seeds by row, pictures as they are read."""
