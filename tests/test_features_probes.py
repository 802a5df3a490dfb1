"""What keeps a feature from a guest, found out beforehand: by real QEMUs and daemons."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import SkipTest

from tests.rig.bootsector import Program
from tests.rig.guest import Guest
from tests.rig.news import wait_until
from tests.rig.pair import NAME, Pair, PairCase
from tests.rig.qemus import LABELS, require
from tests.rig.qmp import QmpError
from tests.rig.users import NOBODY, for_everybody, ordinary

_SWITCH = Path("/proc/sys/vm/unprivileged_userfaultfd")
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")

#: A device that no QEMU moves: its memory is shared with others.
_IVSHMEM = (
    "-object", "memory-backend-ram,id=shared,size=1M,share=on",
    "-device", "ivshmem-plain,memdev=shared",
)  # fmt: skip

#: The guest's RAM is a memory backend called so.
_BACKEND = ("-machine", "memory-backend=ram0")


def _file(path: str, *options: str) -> tuple[str, ...]:
    """Return the arguments for RAM in a file."""
    words = ["memory-backend-file", "id=ram0", "size=32M", f"mem-path={path}", *options]
    return ("-object", ",".join(words), *_BACKEND)


class ProbeCase(PairCase):
    def features(self, pair: Pair) -> dict[str, dict[str, Any]]:
        """Return what the pair would do with each feature."""
        answer = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        return {one["name"]: one for one in answer["features"]}

    def obstacle(self, pair: Pair, name: str) -> tuple[str | None, str, str]:
        """Return side, place and reason of what stands in the way of a feature."""
        one = self.features(pair)[name]
        self.assertFalse(one["selected"])
        return one.get("side"), one["where"], one["reason"]


class UserfaultfdTests(ProbeCase):
    """Postcopy, and what the destination's QEMU may do."""

    def setUp(self) -> None:
        if not _SWITCH.exists() or _SWITCH.read_text().strip() != "0":
            raise SkipTest(f"{_SWITCH} is not 0: userfaultfd is for everybody here")

    def into(self, label: str, *before: str) -> Pair:
        """Start a pair whose destination is an ordinary user's QEMU."""
        pair = self.pair("7.2", label)
        pair.destination.qemu = ordinary(require(label), before=before)
        for_everybody(pair.destination)
        return pair.start()

    def test_ordinary_user(self) -> None:
        """The reason names the switch, and the move goes on without postcopy."""
        for label in LABELS:
            pair = self.into(label)
            side, where, reason = self.obstacle(pair, "postcopy-ram")
            self.assertEqual((side, where), ("destination", "kernel"))
            self.assertIn("sysctl vm.unprivileged_userfaultfd=1", reason)
            self.assertIn(f"user {NOBODY}", reason)
            self.assertEqual("/dev/userfaultfd" in reason, label != "7.2")
            self.assertIn("postcopy-ram", self.features(pair)["postcopy-preempt"]["reason"])
        pair.begin("", require=[], exclude=[])
        self.assertNotIn("postcopy-ram", pair.completed()["plan"]["features"])
        pair.prove_moved()

    def test_device(self) -> None:
        """Where that user may open /dev/userfaultfd, a QEMU that knows of it has postcopy."""
        if not os.path.exists("/dev/userfaultfd"):
            raise SkipTest("this kernel has no /dev/userfaultfd")
        for label in LABELS:
            script = (
                'cp -a /dev/userfaultfd "$0" && chmod 666 "$0" &&'
                ' mount --bind "$0" /dev/userfaultfd && exec "$@"'
            )
            copy = os.path.abspath(f"userfaultfd-{label}")
            pair = self.into(label, "unshare", "--mount", "sh", "-c", script, copy)
            if label == "7.2":
                self.assertEqual(self.obstacle(pair, "postcopy-ram")[1], "kernel")
                continue
            pair.move("direct", "postcopy")
            pair.prove_moved()

    def test_root(self) -> None:
        """Root's QEMU has it."""
        self.assertTrue(self.features(self.pair("7.2").start())["postcopy-ram"]["selected"])


class RamTests(ProbeCase):
    """Postcopy, and what the guest's RAM is."""

    def test_file_on_disk(self) -> None:
        """RAM in a file on a disk cannot be filled in page by page, with no QEMU."""
        for label in LABELS:
            pair = self.pair(label, extra=_file(os.path.abspath("")))
            side, where, reason = self.obstacle(pair.start(), "postcopy-ram")
            self.assertEqual((side, where), ("destination", "guest"))
            self.assertRegex(reason, r"\(ram0\) is in a file on \w+")

    def test_file_in_memory(self) -> None:
        """RAM that others share, in a file in memory, is no obstacle: the guest moves by it."""
        for label in LABELS:
            memfd = ("-object", "memory-backend-memfd,id=ram0,size=32M,share=on", *_BACKEND)
            pair = self.pair(label, extra=memfd).start()
            pair.move("direct", "postcopy")
            pair.prove_moved()

    def test_old_qemu_loses_the_guest(self) -> None:
        """Why it is found out beforehand: QEMU 7.2 takes the capability, and then ends."""
        program = Program(pages=3072, pages_per_tick=16)
        source = self.guest(require("7.2"), "source", program=program).start()
        destination = self.guest(
            require("7.2"), "destination", program=program, incoming=True,
            extra=("-mem-path", os.path.abspath("")),
        ).start()  # fmt: skip
        for guest in (destination, source):
            guest.set_capabilities("events", "return-path", "postcopy-ram")
        source.qmp("migrate-set-parameters", {"max-bandwidth": 4 << 20})
        uri = f"unix:{destination.directory}/stream"
        destination.qmp("migrate-incoming", uri=uri)
        source.qmp("migrate", uri=uri)
        source.wait_migration("active")
        wait_until(lambda: source.qmp("query-migrate")["ram"]["transferred"] > 1 << 19, "RAM")
        source.qmp("migrate-start-postcopy")
        destination.process.wait()
        self.assertFalse(source.running())
        # A newer one refuses.
        newer = self.guest(require("10.0"), incoming=True, extra=("-mem-path", os.path.abspath("")))
        error = self.assertRaises(QmpError, newer.start().set_capabilities, "postcopy-ram")
        self.assertIn("TMPFS or HUGETLBFS only", error.text)

    def test_huge_pages_on_one_side(self) -> None:
        """Pages of different sizes are seen before the stream begins."""
        self.need_huge_pages(40)
        pair = self.pair("7.2", extra=("-object", "memory-backend-ram,id=ram0,size=32M", *_BACKEND))
        huge = "memory-backend-memfd,id=ram0,size=32M,hugetlb=on,hugetlbsize=2M"
        pair.destination = self.waiting_guest("7.2", extra=("-object", huge, *_BACKEND))
        pair.there.config["guest"] = {NAME: {"qmp": f"unix:{pair.destination.qmp_path}"}}
        side, where, reason = self.obstacle(pair.start(), "postcopy-ram")
        self.assertEqual((side, where), ("destination", "guest"))
        self.assertIn("4 KiB and 2048 KiB", reason)
        pair.begin("", require=[], exclude=[])
        self.assertNotIn("postcopy-ram", pair.completed()["plan"]["features"])
        pair.prove_moved()

    def test_huge_pages_on_both_sides(self) -> None:
        """Huge pages on both sides are no obstacle."""
        self.need_huge_pages(40)
        huge = "memory-backend-memfd,id=ram0,size=32M,hugetlb=on,hugetlbsize=2M"
        pair = self.pair("7.2", extra=("-object", huge, *_BACKEND)).start()
        pair.move("direct", "postcopy")
        pair.prove_moved()

    def need_huge_pages(self, wanted: int) -> None:
        """Have this host set some aside, and put that back afterwards."""
        before = int(_HUGE_PAGES.read_text()) if _HUGE_PAGES.exists() else 0
        try:
            _HUGE_PAGES.write_text(str(before + wanted))
        except OSError as error:
            raise SkipTest(f"no huge pages can be set aside here: {error.strerror}") from None
        self.addCleanup(_HUGE_PAGES.write_text, str(before))
        if int(_HUGE_PAGES.read_text()) < before + wanted:
            raise SkipTest(f"this host has no {wanted} huge pages left")


class BlockedTests(ProbeCase):
    """A guest that QEMU does not let go."""

    def test_refused(self) -> None:
        """It is refused with QEMU's reason before anything is set up, on every QEMU."""
        for label in LABELS:
            pair = self.pair(label, extra=_IVSHMEM).start()
            pair.begin("", require=[], exclude=[])
            reason = pair.failed(pair.here)
            self.assertIn("cannot be moved", reason)
            self.assertIn("ivshmem", reason)
            entry = pair.entry(pair.here)
            self.assertEqual(entry["error"]["class"], "guest-blocked")
            self.assertNotIn("plan", entry)
            pair.prove_stayed()

    def test_shown(self) -> None:
        """query-features says it of the guest, and refuses to plan for the pair."""
        pair = self.pair("7.2", extra=_IVSHMEM).start()
        answer = pair.here.execute("query-features", guest=NAME)
        (blocker,) = answer["blocked-reasons"]
        self.assertIn("ivshmem", blocker)
        error = self.assertRaises(
            QmpError, pair.here.execute, "query-features", guest=NAME, uri=pair.there.uri
        )
        self.assertIn(blocker, error.text)
        free: Guest = self.pair("7.2").source.start()
        pair.here.execute("guest-add", name="free", qmp=f"unix:{free.qmp_path}")
        self.assertNotIn("blocked-reasons", pair.here.execute("query-features", guest="free"))
