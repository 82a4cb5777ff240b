"""The commands as functions, the run's folder, recipes of several stages, export.

Imports everything but the command line."""
