"""Corpus sources, the parquet cache, the tokenizer, packed token rows, masking and order. No torch."""
