"""The test bed of one case: a temporary directory and everything private that is started in it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from . import files, oci, picture, process
from .case import CaseFailed, check, contains
from .containerd import Containerd
from .guests import Guests
from .leftovers import Leftovers
from .ovms import RUNTIME, Ovms
from .registry import Registry
from .terminal import Session


class Bed:
    """What a case is given. Parts come into being when they are first asked for and go with the case."""

    def __init__(self, release: str, guests: Guests, patience: float, scratch: str) -> None:
        token = "oe" + secrets.token_hex(3)
        self.release = release
        self.guests = guests
        #: Seconds that something quick may take here; an emulated host needs more than a real one.
        self.patience = patience
        # Unix socket paths are at most 107 bytes long, so this one is short.
        self.dir = Path(tempfile.mkdtemp(prefix=token, dir=scratch))
        self.namespace = token
        self._leftovers = Leftovers(token)
        self._closers: list[Callable[[], None]] = []

    def later(self, closer: Callable[[], None]) -> None:
        """Has `closer` called at the end of the case, whatever happens; the last one first."""
        self._closers.append(closer)

    @cached_property
    def ovms(self) -> Ovms:
        """The programs of ovms with settings of their own; its snapshotter is started on first use."""
        ovms = Ovms(self.dir, self.patience)
        self.later(ovms.stop)
        return ovms

    @cached_property
    def containerd(self) -> Containerd:
        """containerd and the snapshotter, as an operator installs them."""
        self.ovms.start_snapshotter()
        return self.start_containerd("c", self.ovms.snippet(self.release))

    @property
    def has_containerd(self) -> bool:
        """Whether `containerd` has been started; looking at that starts it."""
        return "containerd" in self.__dict__

    def configure_containerd(self, snippet: str) -> None:
        """Starts `containerd` with another configuration than the shipped one."""
        check(not self.has_containerd, "containerd runs already")
        self.__dict__["containerd"] = self.start_containerd("c", snippet)

    @cached_property
    def plain_containerd(self) -> Containerd:
        """containerd as it comes, without a word of ovms in its configuration."""
        return self.start_containerd("p", "")

    def start_containerd(self, name: str, snippet: str) -> Containerd:
        """Starts a further containerd with the given additional configuration."""
        path = self.ovms.path if snippet else []
        env = self.ovms.env if snippet else {}
        containerd = Containerd(self.release, self.dir / name, self.namespace, self.patience, path, env, snippet)

        def close() -> None:
            try:
                containerd.purge()
            finally:
                containerd.stop()

        self.later(close)
        return containerd

    @cached_property
    def registry(self) -> Registry:
        """A registry on 127.0.0.1."""
        registry = Registry(self.dir / "registry", self.patience)
        self.later(registry.stop)
        return registry

    def ordinary(self, image: oci.Image) -> Path:
        """Writes an ordinary image as an OCI layout."""
        return oci.write(image, Path(tempfile.mkdtemp(prefix="image", dir=self.dir)))

    def close(self, *, failed: bool = False, logs: Path | None = None) -> list[str]:
        """Ends everything; returns what went wrong on the way and what is left on the machine.

        If anything did, or the case has failed already, the daemons' logs are copied to `logs`.
        """
        wrong: list[str] = []
        while self._closers:
            try:
                self._closers.pop()()
            except (CaseFailed, OSError) as error:
                wrong.append(f"at the end: {error}")
        wrong += [f"left behind: {what}" for what in self._leftovers.find()]
        self._leftovers.remove()
        if logs and (failed or wrong):
            self._save_logs(logs)
        shutil.rmtree(self.dir, ignore_errors=True)
        if self.dir.exists():
            wrong.append(f"cannot remove {self.dir}")
        return wrong

    def _save_logs(self, destination: Path) -> None:
        """Copies the logs of the daemons and what guests said to files aside."""
        destination.mkdir(parents=True, exist_ok=True)
        for path in files.below(self.dir):
            if path.is_file() and (path.name == "log" or path.suffix == ".console"):
                name = "-".join(path.relative_to(self.dir).parts)
                shutil.copy(path, destination / name)

    def import_vm(self, behaviour: str, **options: str) -> str:
        """Builds the image of a guest and imports it for our snapshotter; returns its name in containerd."""
        return self.import_for_ovms(self.guests.layout(behaviour, **options))

    def import_for_ovms(self, layout: Path) -> str:
        """Imports an OCI layout and unpacks it with our snapshotter; returns its name in containerd."""
        before = self.image_names()
        self.containerd.import_layout(layout, "--snapshotter", "ovms")
        new = [name for name in self.image_names() if name not in before and not name.startswith("import-")]
        check(new, f"{layout.name} was imported under no name")
        return new[0]

    def image_names(self) -> list[str]:
        """The images in containerd."""
        return self.containerd.ctr("images", "ls", "-q").out.split()

    def vm(self, image: str, name: str, *flags: str, args: tuple[str, ...] = (), status: int | None = 0) -> process.Done:
        """`ctr run` of a machine; unless a flag says otherwise, attached until it ends."""
        return self.containerd.ctr(*self._vm_words(image, name, flags, args), status=status)

    def vm_session(self, image: str, name: str, *flags: str, args: tuple[str, ...] = ()) -> Session:
        """The same with its input and output in the hands of the case; `-t` among the flags gives it a terminal."""
        argv = self.containerd.argv(*self._vm_words(image, name, flags, args))
        return Session(argv, self.ovms.env, tty="-t" in flags, patience=self.patience * 2)

    def _vm_words(self, image: str, name: str, flags: tuple[str, ...], args: tuple[str, ...]) -> list[str]:
        return ["run", "--snapshotter", "ovms", "--runtime", RUNTIME, *flags, image, name, *args]

    def detached(self, behaviour: str, name: str = "vm", *flags: str, image: str = "") -> Path:
        """Starts a machine detached and waits until its guest is at work; returns the file with its console."""
        console = self.dir / f"{name}.console"
        self.vm(image or self.import_vm(behaviour), name, "-d", "--log-uri", f"file://{console}", *flags)
        self.await_console(console, self.guests.ready(behaviour))
        return console

    def await_console(self, console: Path, wanted: str) -> None:
        """Waits for a text on a console that goes to a file."""
        def said() -> bool:
            return console.exists() and wanted in console.read_text(encoding="utf-8", errors="replace")

        try:
            process.until(f"the guest says {wanted!r}", said, self.patience * 2)
        except CaseFailed as failure:
            seen = console.read_text(encoding="utf-8", errors="replace") if console.exists() else "nothing"
            raise CaseFailed(f"{failure}; its console: {seen[-400:]!r}") from None

    def await_state(self, name: str, state: str) -> None:
        """Waits until containerd shows a task in a state."""
        process.until(f"{name} is {state}", lambda: self.containerd.tasks().get(name) == state, self.patience)

    def kill_and_delete(self, name: str = "vm") -> None:
        """Kills a machine, checks that it ended with 137, and deletes it; nothing of it may be left."""
        self.containerd.ctr("task", "kill", "-s", "SIGKILL", name)
        self.await_state(name, "STOPPED")
        self.containerd.delete_task(name, 137)
        self.containerd.ctr("containers", "delete", name)
        self.nothing_half_made()

    def refused(self, verb: Callable[[], process.Done], *wanted: str) -> process.Done:
        """Runs what must be refused: checks that it fails, that it says all of `wanted`, and that nothing half-made is left of it."""
        if self.has_containerd:
            # What others have left to it would go in the middle of the comparison.
            self.containerd.collect_garbage()
        before = picture.take(self)
        done = verb()
        self.failed(done, *wanted)
        self.await_picture(before, f"`{process.shown(done.argv[:8])}`")
        return done

    def failed(self, done: process.Done, *wanted: str) -> None:
        """Checks that a command failed in an orderly way and said all of `wanted`."""
        check(done.status != 0, f"`{process.shown(done.argv)}` went through: {done.text[-300:]!r}")
        for words in wanted:
            contains(done.text, words, f"what `{process.shown(done.argv[:8])}…` said")
        check("panicked" not in done.text, f"it panicked: {done.text[-600:]!r}")

    def await_picture(self, before: picture.Picture, after: str) -> None:
        """Waits until everything is as it was before something was refused, whose name `after` gives; fails the case if it never is.

        containerd leaves the snapshots that nothing refers to (an `extract-…` one that it could not remove, the good layers
        below a refused one, that of a container which was deleted) to its garbage collection. It is run here, so what is
        still there afterwards is held by something. A directory that the snapshotter's store does not know is not excused:
        the collection would tidy it away too, and is not run then.
        """
        left = ""

        def same() -> bool:
            nonlocal left
            now = picture.take(self)
            left = before.difference(now)
            if left and self.has_containerd and now.consistent:
                self.containerd.collect_garbage()
            return not left

        try:
            process.until("nothing is left", same, self.patience, step=0.1)
        except CaseFailed:
            raise CaseFailed(f"after {after}: {left}") from None

    def nothing_half_made(self) -> None:
        """Checks that no task, no machine's process and no record of one is there."""
        check(not self.containerd.tasks(), f"tasks are left: {self.containerd.tasks()}")
        left = sorted(str(path) for path in files.below(self.ovms.runtime / "machines") if not path.is_dir())
        check(not left, f"records of machines are left: {left}")
        vmms = [name for name in process.descendants().values() if "ovms-vmm" in name]
        check(not vmms, f"VMMs are left: {vmms}")

    def hashes(self, *, ram: bool = False) -> dict[str, str]:
        """Hashes of all that machines share: layers, tables, copies of kernels and initial RAM disks, unpacked RAM.

        It fails where it would compare nothing: without a layer's files, or without memory where the image has `ram`.

        Left out are what a machine may change, its top and the list of pages that it touched first, and the daemon's own
        books. What is being made lies in `tmp`, or in a directory whose name begins with a dot.
        """
        state = self.ovms.state
        shared = (*state.glob("s/*/layer/*"), *state.glob("blobs/*"), *state.glob("ram/[!.]*/*"))
        found = {}
        for path in sorted(path for path in shared if path.is_file() and path.name != "working-set"):
            found[str(path.relative_to(state))] = files.digest(path)
        for kind in ("data", "map", "table"):
            check([name for name in found if name.endswith(f"/layer/{kind}")], f"no {kind} of a layer is among the files {sorted(found)}")
        check(not ram or [name for name in found if name.endswith("/memory")], f"no memory is among the files {sorted(found)}")
        return found

    def unchanged(self, before: dict[str, str]) -> None:
        """Checks that every file whose hash was taken is still there and has the same."""
        after = self.hashes(ram=any(name.endswith("/memory") for name in before))
        changed = [name for name, value in before.items() if after.get(name) != value]
        check(before and not changed, f"these files of the image changed: {changed}")

    def run(self, argv: list[str | Path], *, status: int | None = 0, timeout: float | None = None) -> process.Done:
        """Runs a command with the settings of this bed."""
        return process.run(argv, status=status, timeout=timeout or self.patience * 4, env=self.ovms.env)
