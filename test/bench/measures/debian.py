"""A stock Debian kernel, spawn to its first line and to its init, beside QEMU with the same kernel, initrd and disk on
the same host: directly where the CPU has svm or vmx, else inside the nested host."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.report import Figure, compared
from e2e.harness import places, records
from e2e.harness.bed import Bed
from e2e.harness.case import CaseFailed, CaseSkipped
from e2e.harness.guests import Guests
from e2e.harness.ovms import REPO
from testbed import nestedhost

#: Rounds that count, one boot of each machine in each; fewer, but never less than three, when the time is used up.
_RUNS = 5
_LEAST_RUNS = 3
_SECONDS = 420
#: The first line of a kernel that is not told to be quiet, and the first of the guest's init.
_FIRST = b"Linux version"
_INIT = b"ovms-guest: kernel"
_MEMORY_MIB = 512
_OURS = "ovm run"
#: Writes to nearly all memory that is free, 1 MiB at a time.
_WRITE_ALL = """
import mmap
free = int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]) - (384 << 10)
chunk = bytes([255]) * (1 << 20)
with mmap.mmap(-1, free >> 10 << 20) as memory:
    for _ in range(free >> 10):
        memory.write(chunk)
"""
#: Seconds for one boot.
_PATIENCE = 90


@dataclass(frozen=True)
class Boot:
    """Milliseconds from the spawn of the command."""

    first_line: float
    init: float


def measure(_runs: int) -> Iterator[Figure]:
    """The figures of this host, or of the nested one."""
    if places.hardware_virtualisation():
        yield from measure_here()
        return
    if reason := places.unusable("nested"):
        raise CaseSkipped(reason)
    host = nestedhost.NestedHost.default()
    inner = REPO / "target/bench/debian.json"
    inner.unlink(missing_ok=True)
    argv = ["python3", "-B", str(REPO / "test/bench/run.py"), "--inside", str(inner)]
    try:
        with host.use():
            status = nestedhost.relay(host, argv, cwd="/", silence=2 * _PATIENCE)
    except nestedhost.NestedError as error:
        raise CaseFailed(str(error)) from error
    if status != 0 or not inner.exists():
        raise CaseFailed(f"the measurement in the nested host ended with {status}")
    yield from records.read(Figure, inner)


def measure_here() -> list[Figure]:
    """ovm and QEMU in turns on this host."""
    guests = Guests("stock", "/var/tmp")
    bed = Bed("containerd-2.4", guests, 90.0, "/var/tmp")
    try:
        parts = guests.parts("poweroff")
        loud = guests.layout("poweroff", extra_args="loglevel=7 ignore_loglevel", name="loud")
        flat = bed.dir / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(parts.disks[0]), "-F", "qcow2", str(flat)], check=True)
        ours_argv = [str(bed.ovms.program("ovm")), "run", str(loud), "--memory", f"{_MEMORY_MIB}M"]
        peers = {
            "QEMU q35": ["-M", "q35"],
            "QEMU microvm": ["-M", "microvm,pcie=on,acpi=on,rtc=on,pit=off,pic=off"],
        }
        append = f"{parts.args} loglevel=7 ignore_loglevel"
        commands = {_OURS: ours_argv} | {
            name: _qemu(machine, parts.kernel, parts.initrd, flat, append) for name, machine in peers.items()
        }
        boots = _rounds(commands, bed.ovms.env)
    finally:
        bed.close()
        guests.close()
    return [
        _figure("stock Debian, spawn to its first line", [(name, boot.first_line) for name, boot in boots]),
        _figure("stock Debian, spawn to its init", [(name, boot.init) for name, boot in boots]),
    ]


def _rounds(commands: dict[str, list[str]], env: dict[str, str]) -> list[tuple[str, Boot]]:
    """Boots the machines in turns, so that all see the same weather; the first round warms caches and is not counted.

    Before each, all free memory is written. An emulator remembers the code that it has translated by where it lay in memory,
    and whoever writes there later, a new guest's kernel that unpacks itself, pays for its forgetting: 2.8 s or 0, by chance.
    """
    began = time.monotonic()
    boots: list[tuple[str, Boot]] = []
    for run in range(_RUNS + 1):
        if run > _LEAST_RUNS and time.monotonic() - began > _SECONDS:
            break
        for name, argv in commands.items():
            subprocess.run([sys.executable, "-c", _WRITE_ALL], check=True)
            boot = _boot(argv, env)
            print(f"debian: round {run} of {_RUNS}: {name}: first line {boot.first_line:.0f} ms, init {boot.init:.0f} ms", flush=True)
            if run:
                boots.append((name, boot))
    return boots


def _figure(name: str, times: list[tuple[str, float]]) -> Figure:
    # The fastest round of each: an emulated processor shares a real one with whatever else runs, which only ever adds.
    best = {machine: min(time for of, time in times if of == machine) for machine, _ in times}
    rounds = len(times) // len(best)
    ours = best.pop(_OURS)
    fastest = min(best, key=lambda peer: best[peer])
    return compared(f"{name}, best of {rounds}", ours, "ms", fastest, best[fastest], 0.9)


def _qemu(machine: list[str], kernel: Path, initrd: Path | None, disk: Path, append: str) -> list[str]:
    return [
        "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", *machine, "-m", str(_MEMORY_MIB), "-smp", "1", "-nodefaults",
        "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", append, "-drive", f"id=d,file={disk},format=qcow2,if=none,cache=unsafe,snapshot=on",
        "-device", "virtio-blk-pci,drive=d", "-device", "virtio-rng-pci",
    ]


def _boot(argv: list[str], env: dict[str, str]) -> Boot:
    """Runs a machine to its end; when its marks came."""
    began = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | env) as child:
        assert child.stdout
        seen = b""
        marks: dict[bytes, float] = {}
        try:
            while chunk := os.read(child.stdout.fileno(), 65536):
                seen += chunk
                for mark in (_FIRST, _INIT):
                    if mark not in marks and mark in seen:
                        marks[mark] = (time.perf_counter() - began) * 1000
                if len(marks) == 2 or time.perf_counter() - began > _PATIENCE:
                    break
        finally:
            with contextlib.suppress(OSError):
                child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
    if len(marks) < 2:
        raise CaseFailed(f"`{' '.join(argv[:3])}…` did not come to its init: {seen[-500:]!r}")
    return Boot(marks[_FIRST], marks[_INIT])
