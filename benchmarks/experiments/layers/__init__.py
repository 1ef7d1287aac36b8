"""What the layers of `sparseflash.nn` promise, by tests that can fail; a page for each kind of promise."""
