"""The command line as ``python -m sparseflash``, which is also what ``torchrun -m sparseflash`` starts."""

from sparseflash.cli import main

if __name__ == "__main__":
    main()
