"""The bilevel search: α̃ and its weightings, the sizes of terms, hypergradients.

Imports train and what lies below it; never build, report or runs."""
