"""The whole trainer under kills, signals, full disks, damaged files and bad rewards: ``python -m tests.reliability``."""
