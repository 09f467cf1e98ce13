"""The benchmarks of the service and of alternatives: ``python -m tests.benchmarks``."""
