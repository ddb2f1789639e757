"""Benches: what each part of a run costs, beside others' parts on the same machine in the same minutes.

A bench warms up, takes several rounds, and gives medians with their least and greatest. Contenders take turns
(`arena.py`), so that what else the machine does meets all alike, and it is their ratio that counts.
"""
