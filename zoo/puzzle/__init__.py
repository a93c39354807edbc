"""Puzzle's parts: what to keep, children trained block by block, scores, costs, the choice, imitation of the parent."""
