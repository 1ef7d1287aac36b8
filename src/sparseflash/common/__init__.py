"""What every other room may import: errors, files that are written whole or not at all, names that moved."""
