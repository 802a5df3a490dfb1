"""The features that come with qmigd, one module each, and the registry that finds them all."""
