"""Pair files -> records -> shards -> stream -> ragged batches."""
