"""Sentence-pair tasks: one file each, with what their labels mean. No torch, no numpy."""
