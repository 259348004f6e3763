"""Mutants of training."""

from benchmarks.mutants import Mutant

MUTANTS: list[Mutant] = []
