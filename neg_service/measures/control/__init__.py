"""Control: the least joint shift of neurons that gives a target the probability asked for, and what else it does.

`control.py` is what people call. What is wanted: `aims.py`; the least shift by a gradient: `least_shift.py`; how far to
go along it: `search.py`; running a model with shifted neurons: `shifted_rows.py`. Prompts that are held still:
`references.py`; what shifts do to others: `side_effects.py`, `other_prompts.py`.
"""
