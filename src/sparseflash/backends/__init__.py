"""Where plans run: one module or package each, which only `dispatch` knows."""
