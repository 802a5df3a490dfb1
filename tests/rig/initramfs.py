"""The first programs of the lane's guest: an archive that the kernel unpacks, and what runs in it.

The guest's root is this host's own, read-only over 9p, with a tmpfs laid over it: so
the working tree, its Python and its QEMUs are where they are here, and whatever is
written is gone with the guest.  ``/tmp`` and ``/run`` are the guest's own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from tests.rig.kernel import Kernel

__all__ = ["PORT", "SHARE", "initramfs"]

#: The tag of the 9p share that is to have this host's root.
SHARE = "host"

#: The name of the virtio port that leads out to the rig.
PORT = "rig"

#: In the guest: what it needs of its own, so that nothing of the host's is asked for it.
_OWN = "/run/guest"

_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_rng")

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose {share} /host
mount -t tmpfs over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /root
mount -t tmpfs run /root/run
mv /guest /root{own}
cp /bin/busybox /root{own}/busybox
mkdir -p /root/lib/modules/{version}
mount --bind /host{module_directory} /root/lib/modules/{version}
echo {own}/modprobe >/proc/sys/kernel/modprobe
# A working tree or a Python may be in /tmp itself.
mkdir /over/tmp
for path in {paths}; do
    case $path in /tmp/*)
        mkdir -p /over$path
        mount --bind /root$path /over$path
    esac
done
mount --rbind /over/tmp /root/tmp
chmod 1777 /root/tmp
mkdir /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
ip link set lo up
for place in proc sys dev; do mount --move /$place /root/$place; done
exec switch_root /root {own}/busybox sh {own}/start
"""

_START = """\
port() {{
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat $port/name)" = {port} ] && echo /dev/${{port##*/}}
    done
}}
until [ -c "$(port)" ]; do {own}/busybox usleep 10000; done
cd {directory}
{environment} {command} "$(port)" </dev/null
echo o >/proc/sysrq-trigger
exec {own}/busybox sleep 60
"""

_MODPROBE = """\
#!{own}/busybox sh
exec {modprobe} "$@"
"""


def initramfs(
    kernel: Kernel,
    command: Sequence[str],
    *,
    directory: str,
    environment: Mapping[str, str],
    paths: Sequence[str],
) -> bytes:
    """Return the archive.

    :param command: what is run, as root, with the path of the port to the rig for a last
        argument; the guest is powered off when it ends.
    :param directory: where it runs.
    :param environment: all of its environment; what the guest needs is put before ``PATH``.
    :param paths: directories of this host that have to be seen even if they are in ``/tmp``.
    """
    modules = dict(kernel.module_files(*_MODULES))
    search = f"{_OWN}:{environment['PATH']}"
    init = _INIT.format(
        modules=" ".join(modules),
        share=SHARE,
        own=_OWN,
        version=kernel.version,
        module_directory=shlex.quote(str(kernel.modules)),
        paths=shlex.join(paths),
    )
    start = _START.format(
        port=PORT,
        own=_OWN,
        directory=shlex.quote(directory),
        environment="env -i "
        + shlex.join(f"{name}={value}" for name, value in {**environment, "PATH": search}.items()),
        command=shlex.join(command),
    )
    modprobe = _MODPROBE.format(own=_OWN, modprobe=shlex.join(kernel.command("modprobe")))
    files = {f"modules/{name}.ko": content for name, content in modules.items()}
    programs = {
        "init": init.encode(),
        "bin/busybox": kernel.busybox.read_bytes(),
        "guest/start": start.encode(),
        "guest/modprobe": modprobe.encode(),
    }
    folders = ("bin", "dev", "guest", "host", "modules", "over", "proc", "root", "sys")
    entries = [(name, 0o040755, b"") for name in folders]
    entries += [(name, 0o100644, content) for name, content in files.items()]
    entries += [(name, 0o100755, content) for name, content in programs.items()]
    return b"".join(_archive(entries))


def _archive(entries: Sequence[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """Write a cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format)."""
    for number, (name, mode, content) in enumerate((*entries, ("TRAILER!!!", 0, b"")), 1):
        encoded = os.fsencode(name) + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device and its own twice, name, checksum
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        yield header + bytes(-len(header) % 4)
        yield content + bytes(-len(content) % 4)
