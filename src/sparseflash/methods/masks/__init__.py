"""Fixed masks: what is seen depends on positions alone."""
