"""What makes plans, one family a file: each returns the fields of a plan as a dictionary.

None of them touches Tq x Tk, and none loops over rows or heads. Positions, ranges and orders come from prefix
sums and sorted searches, O(T log T) at most.
"""
