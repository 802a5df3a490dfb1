"""Coverage-guided fuzzing of everything that reads QEMU's stream: ``make fuzz``.

``target`` says what has to hold for any bytes, ``seeds`` are small streams to begin with,
``corpus`` what came of running it for long, made as small as it goes.  ``__main__`` runs it, with
atheris, which ``make fuzz`` installs for that: it is for few versions of Python.  What is
in the corpus is replayed by an ordinary test (``tests/test_stream_fuzz.py``).
"""
