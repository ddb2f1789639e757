"""Hugging Face parquet files as a source of shards."""
