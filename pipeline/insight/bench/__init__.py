"""Benches: what each part of a run costs on this machine.

A bench warms up, runs several rounds, and reports medians with minimum and maximum. Candidates take turns
(`interleaved.py`), so that other load on the machine affects all of them equally; their ratio is what counts. Benches
that compare with other projects are scripts in `benchmarks/`.
"""
