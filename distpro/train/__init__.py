"""One training: the loop, optimisers and rates, evaluation, state, several processes, logs, the teacher's cache.

Imports objective, weights and what lies below them; never search, build, report or runs."""
