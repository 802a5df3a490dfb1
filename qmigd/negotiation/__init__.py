"""Who wants what, and what comes of it: pure functions, no I/O.

``policy``
    what the local operator and the user of one migration ask for;
``terms``
    what one side lays on the table, and its form on the wire;
``obstacles``
    why a feature is not used, in one form;
``select``
    the choice of features and path out of both sides' terms;
``plan``
    the outcome, the same on both sides.
"""
