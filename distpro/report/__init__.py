"""What is said about configs, schedules and results: cost, words, plots.

Imports build and what lies below it; never runs."""
