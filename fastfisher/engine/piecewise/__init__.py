"""Functions with kinks, once for all that ask: their sides, the map on a recorded side, the slope there.

``rules.py`` says what a rule is and has the elementwise ones, ``selection.py`` those that select elements (maxima,
sorting, pools); ``table.py`` says which function has which rule, and which are smooth. Gates record and replay by these
rules; the tape of :mod:`fastfisher.engine.taylor` takes from them what is piecewise linear, and the derivative.
"""
