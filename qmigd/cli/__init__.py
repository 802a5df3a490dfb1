"""``qmigctl``: drives a qmigd from a terminal or from a script."""
