"""The daemon: its service, its configuration, and its management socket."""
