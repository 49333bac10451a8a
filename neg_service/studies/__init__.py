"""What runs of several measures say together.

Each study is a package with the same files: `options.py`, what it may be told; `pipeline.py`, its scans and what is
made of them; `tables.py`, the rows that are stored; `report.py`, the tables as text, and `page.py`, as sections of a
page. `scans.py`, `tables.py` and `kinds.py` are what all share. A study imports no other one.

Studies stand above `report/`, whose page, figures and cells their sections are made of: so a study is one package, and
the report needs no change for a new one.
"""
