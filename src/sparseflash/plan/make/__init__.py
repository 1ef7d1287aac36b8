"""Implementations of the constructors, one family a file: each returns the fields of a plan as a dictionary.

None loops over single rows; except `from_mask` in a compiled function, none allocates Tq x Tk values: dense
input is read in slabs. Positions, ranges and orders come from prefix sums and binary searches.
"""
