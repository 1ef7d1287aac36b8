"""Integrations with host libraries: each package here serves one host, and is imported only with it."""
