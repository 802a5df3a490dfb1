"""What the tests, the demo and the benchmark stand on: real QEMUs, guests and daemons.

===============  ==============================================================
``keeper``       sees to it that nothing started here outlives this process
``news``         waiting for something to be true, by event
``process``      one child process with its log
``qmp``          a small synchronous QMP client
``debian``       fetches Debian's packages, and installs nothing
``qemus``        finds QEMU 7.2, 10.0 and 11.x, fetching what the host lacks
``bootsector``   the guest: counts, dirties its RAM, and its RAM can be checked
``guest``        a QEMU that runs that guest
``proofs``       what has to be true of a guest that was moved
``daemons``      a qmigd daemon in a process of its own
``netns``        two network namespaces and a link that can be cut
``rdma``         a soft RDMA device, for the lane, and the drivers for it
``users``        QEMUs of ordinary users, with limits
``case``         the base of the tests that use all this
``tls``          a TLS session in user space that can go on in the kernel
``wire``         a connection with somebody in between, who sees and changes
``kernel``       finds a stock Debian kernel
``lane``         runs tests on that kernel, and reports them out here
``initramfs``    what that kernel starts with
``inside``       what runs the tests in there
``rdma``         an RDMA device in there
``trials``       runs all tests, in two trials at once
``host.sh``      installs the programs that the host lacks
===============  ==============================================================

Everything is synchronous: a call returns when the thing is done, or raises.
Guests and daemons are other processes, so that a test with a reactor can call
short things directly; what waits for the test's own reactor to act goes through
``deferToThread``.  Deadlines here turn a hang into a failure with a reason; no
test relies on one for its outcome.
"""
