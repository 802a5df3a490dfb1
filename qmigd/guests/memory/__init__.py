"""The ``memory`` guest: RAM, a workload and a migration engine, in a process of its own.

It is a guest for hosts without a QEMU and for tests.  To qmigd it is a QEMU: it answers on
a QMP socket, and moves by QEMU's stream.  So nothing above this package knows of it, but
for the configuration, which starts it.

===============  ==========================================================================
module           what it has
===============  ==========================================================================
``options``      what it is made of, out of the configuration or a command line
``kernel``       userfaultfd and PAGEMAP_SCAN, as this kernel has them
``ram``          the RAM, in a memfd, mapped twice
``dirty``        which pages were written since one last looked
``workload``     what writes them, and how to prove that nothing of that was lost
``devices``      the state that moves at the end
``settings``     capabilities and parameters, and the schema that lists them
``machine``      all of it together: run state, migration, events
``channels``     connections for a stream, and their bandwidth
``outgoing``     the source's side of a move
``incoming``     the destination's
``monitor``      the QMP commands
``__main__``     the process: ``python -m qmigd.guests.memory``
===============  ==========================================================================

numpy is imported by these modules only when the guest runs, never by the daemon.
"""
