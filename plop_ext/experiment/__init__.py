"""Placements tried on held-out rows: candidates, a schedule of trials, their journal, and a verdict with an interval.

The parts are pure functions of what the trials returned: `schedule` says which trials there are, `race` which come
next, `verdict` what they show. Only `trial` and `measure` run the model.
"""
