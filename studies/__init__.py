"""Experiments that test the papers' claims, on the toy world and on real clips: docs/results.md."""
