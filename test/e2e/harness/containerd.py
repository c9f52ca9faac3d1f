"""A private containerd with its own root, state, socket and plugins."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from testbed import gotools

from . import process
from .case import CaseFailed, major
from .process import Daemon, Done

#: The releases that cases can run on.
RELEASES = {spec.name: spec for spec in (
    gotools.CONTAINERD_2_4, gotools.CONTAINERD_2_3, gotools.CONTAINERD_2_1, gotools.CONTAINERD_1_7,
)}

#: Plugins that no case uses and that cost start-up time or look at the machine outside, by major version.
_DISABLED = {
    2: (
        "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
        "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp",
        "io.containerd.internal.v1.tracing",
    ),
    1: (
        "io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
        "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
    ),
}


def programs(release: str) -> Path:
    """The directory with containerd, ctr and the runc shim of a release."""
    return gotools.directory(RELEASES[release])


class Containerd:
    """One containerd; `ctr` talks to it in a namespace of the case's own."""

    def __init__(self, release: str, directory: Path, namespace: str, patience: float,
                 path: list[Path], env: dict[str, str], snippet: str = "") -> None:
        self.release = release
        self.namespace = namespace
        self._programs = programs(release)
        self._directory = directory
        self._patience = patience
        #: What its daemons and clients have in their environment.
        self.env = env | {"PATH": ":".join([str(self._programs), *map(str, path), os.environ["PATH"]])}
        # containerd unpacks checkpoints there and does not remove them.
        self.env |= {"TMPDIR": str(directory), "XDG_RUNTIME_DIR": ""}
        directory.mkdir()
        self.socket = directory / "c.sock"
        self._config = directory / "config.toml"
        self._config.write_text(self._base_config() + snippet, encoding="utf-8")
        self._daemon = self._start()

    def _base_config(self) -> str:
        disabled = ", ".join(f'"{name}"' for name in _DISABLED[major(self.release)])
        version = 3 if major(self.release) == 2 else 2
        return (
            f'version = {version}\nroot = "{self._directory / "root"}"\nstate = "{self._directory / "state"}"\n'
            f"disabled_plugins = [{disabled}]\n"
            f'[grpc]\n  address = "{self.socket}"\n'
            f'[ttrpc]\n  address = "{self._directory / "t.sock"}"\n'
        )

    def _start(self) -> Daemon:
        daemon = Daemon(
            self.release, [self._programs / "containerd", "--config", self._config, "--log-level", "info"],
            self._directory / "log", self.env,
        )
        try:
            daemon.await_ready(self._answers, self._patience)
        except BaseException:
            daemon.stop(signal.SIGKILL)
            raise
        return daemon

    def _answers(self) -> bool:
        return self.socket.exists() and self.ctr("version", status=None).status == 0

    @property
    def log(self) -> str:
        """Its log."""
        return self._daemon.logged()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._daemon.pid

    def argv(self, *words: str | Path) -> list[str]:
        """The command line of a ctr command."""
        return [str(self._programs / "ctr"), "--address", str(self.socket), "--namespace", self.namespace, *map(str, words)]

    def ctr(self, *words: str | Path, status: int | None = 0, timeout: float | None = None, stdin: str | None = None) -> Done:
        """Runs ctr."""
        return process.run(self.argv(*words), status=status, timeout=timeout or self._patience * 4, stdin=stdin, env=self.env)

    def import_layout(self, layout: Path, *options: str) -> None:
        """Imports an OCI layout through a tar stream, as `ctr images import -` takes it."""
        archive = self._directory / "import.tar"
        process.run(["tar", "-C", layout, "-cf", archive, "."])
        try:
            self.ctr("images", "import", *options, archive)
        finally:
            archive.unlink()

    def snapshot_diff(self, to: Path, *snapshots: str) -> None:
        """`ctr snapshots diff` of our snapshotter, into a file."""
        argv = self.argv("snapshots", "--snapshotter", "ovms", "diff", *snapshots)
        with open(to, "wb") as out:
            child = process.spawn(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | self.env)
            _, said = child.communicate(timeout=self._patience * 4)
        if child.returncode != 0:
            raise CaseFailed(f"`{process.shown(argv)}` gave {child.returncode}: {said}")

    def tasks(self) -> dict[str, str]:
        """Tasks and their states."""
        lines = self.ctr("task", "ls").out.splitlines()[1:]
        return {fields[0]: fields[2] for fields in map(str.split, lines) if len(fields) >= 3}

    def task_pid(self, task: str) -> int:
        """The process that containerd knows as the task."""
        for line in self.ctr("task", "ls").out.splitlines()[1:]:
            fields = line.split()
            if fields[0] == task:
                return int(fields[1])
        raise CaseFailed(f"there is no task {task}")

    def delete_task(self, task: str, status: int = 0) -> None:
        """Deletes a stopped task; fails the case unless it had ended with `status`, which ctr tells only as a warning."""
        text = self.ctr("task", "delete", task).text
        told = re.search(r"exit with non-zero exit code (\d+)", text)
        seen = int(told[1]) if told else 0
        if seen != status:
            raise CaseFailed(f"task {task} had ended with {seen}, not {status}")

    def collect_garbage(self) -> None:
        """Has containerd remove whatever nothing refers to, and waits for it."""
        self.ctr("leases", "create", "--id", "collector")
        self.ctr("leases", "delete", "--sync", "collector")

    def stored_snapshots(self, snapshotter: Path) -> list[str]:
        """Keys of all snapshots that the snapshotter itself has, each with its kind, those included that containerd has taken off
        its own list and not removed yet. A snapshotter serves the same API as containerd, so ctr can ask it."""
        argv = [str(self._programs / "ctr"), "--address", str(snapshotter), "--namespace", self.namespace]
        done = process.run([*argv, "snapshots", "--snapshotter", "ovms", "ls"], timeout=self._patience, env=self.env)
        return [f"{fields[0]} ({fields[-1]})" for fields in map(str.split, done.out.splitlines()[1:]) if fields]

    def purge(self) -> None:
        """Kills and deletes whatever the case left running, through the ordinary commands."""
        for task in self.tasks():
            self.ctr("task", "kill", "-s", "SIGKILL", task, status=None)
            self.ctr("task", "delete", "--force", task, status=None)
        for container in self.ctr("containers", "ls", "-q").out.split():
            self.ctr("containers", "delete", container, status=None)

    def kill(self) -> None:
        """Ends it without letting it say good-bye."""
        self._daemon.stop(signal.SIGKILL)

    def restart(self) -> None:
        """Stops it and starts it again on the same state."""
        self._daemon.stop()
        self._daemon = self._start()

    def stop(self) -> None:
        """Ends it."""
        self._daemon.stop()
