"""Measurements on this machine: runtime curves, the attention table, whole training steps, and the demo."""
