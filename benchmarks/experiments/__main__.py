"""One command an experiment: parses and calls."""

from sparseflash.bench.commands.app import call

from .commands import experiments

if __name__ == "__main__":
    call(experiments)
