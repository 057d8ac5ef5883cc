"""Benchmarks: the ops and the model beside the peers that install from PyPI, in one run, with the machine's facts.

``statescan bench scan conv norm decode prefill train`` (or ``all``) measures each implementation in a process of its
own (so that peak memory, thread pools and compilers don't meet), in interleaved rounds, after checking it against ours.
"""

from statescan.bench.runner import BENCHMARKS, BenchRow, run

__all__ = ["BENCHMARKS", "BenchRow", "run"]
