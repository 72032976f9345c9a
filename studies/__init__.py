"""The papers' claims in miniature, on the toy world, where the truth is known: docs/results.md."""
