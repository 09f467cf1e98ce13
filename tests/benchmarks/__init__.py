"""What the service costs beside what it could be: ``python -m tests.benchmarks``."""
