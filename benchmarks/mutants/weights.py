"""Mutants of weights."""

from benchmarks.mutants import Mutant

MUTANTS: list[Mutant] = []
