"""Measurements behind the README: each writes bench/results/NAME.json. Run from the repository's root."""

import os

# Before torch starts its threads, as in sgsc/cli.py: threads that spin disturb one another on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
