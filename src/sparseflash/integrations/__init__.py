"""Other people's programs: each package here knows one host, and is imported only where that host is."""
