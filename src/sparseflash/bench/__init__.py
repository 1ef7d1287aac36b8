"""Measurements on this machine: any method against any baseline, when sparse pays, and the demo."""
