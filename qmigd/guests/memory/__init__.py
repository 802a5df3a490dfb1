"""The ``memory`` guest: RAM, a workload and a migration engine, in a process of its own.

It is a guest for hosts without a QEMU and for tests.  To qmigd it is a QEMU: it answers on
a QMP socket, and moves by QEMU's stream.  So nothing above this package knows of it, but
for the configuration, which starts it.

===============  =====================================================================
module           what it has
===============  =====================================================================
``options``      what it is made of, out of the configuration or a command line
``kernel``       userfaultfd and PAGEMAP_SCAN, as this kernel has them
``ram``          the RAM, in a memfd, mapped twice
``dirty``        which pages were written since one last looked
``contents``     what is written where, and how to prove that nothing of it was lost
``workload``     the virtual CPU, which writes it
``devices``      the state that moves at the end
``settings``     capabilities and parameters, and the schema that lists them
``machine``      all of it together: run state, migrations, events
``progress``     how far a migration is
``channels``     connections for a stream, and their bandwidth
``vector``       many pages of RAM in one call
``outgoing``     the source's side: from the first connection to the last word
``passes``       its precopy
``answers``      what the destination says to it
``sending``      its pages over the main channel
``spreading``    its multifd channels
``uncopied``     zero copy in these
``writing``      its pages by RDMA
``switching``    its postcopy
``throttle``     auto-converge
``incoming``     the destination's side: the connections
``receiving``    what comes over the main channel, and over that of preempt
``gathering``    its multifd channels
``inlets``       threads that serve these
``landing``      its RDMA
``faults``       its postcopy
``roce``         which RDMA device serves an address
``verbs``        a queue pair, by pyverbs
``pairing``      what both sides' queue pairs have to know of each other, and how it is said
``monitor``      the QMP commands
``__main__``     the process: ``python -m qmigd.guests.memory``
===============  =====================================================================

numpy is imported by these modules only when the guest runs, never by the daemon.
"""
