"""Embedded Spanish sample: a small grammar whose corpus and labelled pairs are true by construction. No torch."""
