"""Mutants of scoring."""

from benchmarks.mutants import Mutant

MUTANTS: list[Mutant] = []
