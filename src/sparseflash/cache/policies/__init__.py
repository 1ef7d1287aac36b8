"""Eviction policies, one per file. A method chooses which keys are read, a policy which keys are kept."""
