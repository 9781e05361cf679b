"""Evaluation: protocols, metrics with intervals, free baselines, plots and the report."""
