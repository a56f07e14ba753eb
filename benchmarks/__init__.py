"""One script per question: `python -m benchmarks.NAME --json`. Quick by default; `--full` for the published figure.

Every figure that matters is a ratio of two things measured in turns in one run: machines differ, and so do their moods.
"""
