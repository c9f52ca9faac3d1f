"""RAM snapshots: what a restore costs beside its floor, how long a guest stands still, what a hundred clones cost."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.measures import memory
from bench.measures.beds import native_bed
from bench.report import Figure, bounded, compared
from e2e.harness import oci, places, process
from e2e.harness.bed import Bed
from e2e.harness.case import CaseFailed, CaseSkipped
from e2e.harness.ovms import REPO, program

_GUESTS = REPO / "target/guests"
_TMPFS = "/dev/shm"
_DISK = "/var/tmp"
#: Of a hundred starts so many must be fast enough.
_MOST = 0.95


def measure(runs: int) -> Iterator[Figure]:
    """All of it."""
    if reason := places.without_kvm():
        raise CaseSkipped(reason)
    yield from _restores(runs * 5)
    yield from _unpack(runs)
    yield from _images(runs)
    yield from _clones()
    yield from _standstill()


@contextmanager
def _scratch(below: str) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="ovms-bench", dir=below))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _json(argv: list[str | Path], timeout: float = 600) -> list[Any]:
    return [json.loads(line) for line in process.run(argv, timeout=timeout).out.splitlines()]


def _guest(name: str) -> Path:
    guest = _GUESTS / f"{name}.elf"
    if not guest.exists():
        raise CaseFailed(f"{guest} is missing: run `make guests`")
    return guest


def _restore_times(mib: int, runs: int, *flags: str) -> dict[str, Any]:
    with _scratch(_DISK) as directory:
        found: dict[str, Any] = _json([program("ovms-bench-restore"), program("ovms-vmm"), program("ovms-bench-floor"), _guest("resume"),
                                       str(mib << 20), str(runs), directory, *flags])[0]
    return found


def _fast_enough(name: str, times: list[float], most: float) -> Figure:
    """A figure for `_MOST` of the runs."""
    times = sorted(times)
    value = times[max(0, round(len(times) * _MOST) - 1)]
    return Figure(name, round(value, 3), "ms", "", None, f"{round(_MOST * 100)} of 100 runs < {most} ms", value < most)


def _restores(runs: int) -> Iterator[Figure]:
    for flags, suffix in (((), ""), (("mlock",), ", mlock_required")):
        found = _restore_times(2048, runs, *flags)
        restores, floors = ([us / 1000 for us in found[key]] for key in ("restore_us", "floor_us"))
        name = f"restore to the first guest byte, 2 GiB{suffix}"
        yield compared(name, statistics.median(restores), "ms", "floor program", statistics.median(floors), 2.0)
        yield _fast_enough(name, restores, 10)
        worst = 10 + max(floors)
        yield Figure(f"{name}, worst of {len(restores)}", round(max(restores), 3), "ms", "", None,
                     f"<= 10 ms + the floor's worst, {max(floors):.3f} ms", max(restores) <= worst)
    count = 200
    with _scratch(_DISK) as directory:
        argv = ["taskset", "-c", "0", program("ovms-bench-restore"), program("ovms-vmm"), program("ovms-bench-floor"), _guest("resume"),
                str(256 << 20), str(count), directory, "keep"]
        rate = count / _json(argv)[0]["all_us"] * 1e6
    yield Figure(f"restores of 256 MiB on one core, {count} machines kept", round(rate), "a second", "", None, ">= 200", rate >= 200)
    sizes = (128, 16384)
    whole: dict[tuple[str, int], list[float]] = {(kind, mib): [] for kind in ("restore", "floor") for mib in sizes}
    slots: dict[tuple[str, int], list[float]] = {key: [] for key in whole}
    # In turns, so that both sizes see the same machine weather.
    for _ in range(5):
        for mib in sizes:
            found = _restore_times(mib, max(4, runs // 10))
            for kind in ("restore", "floor"):
                whole[kind, mib] += [us / 1000 for us in found[f"{kind}_us"]]
            steps = found["steps_us"]
            slots["restore", mib] += [(after - before) / 1000 for before, after in zip(steps["vm"], steps["slots"], strict=True)]
            slots["floor", mib] += [us / 1000 for us in found["floor_slot_us"]]
    for (kind, mib), times in whole.items():
        yield Figure(f"{kind} to the first guest byte, {mib} MiB", round(statistics.median(times), 3), "ms")
        yield Figure(f"of that KVM_SET_USER_MEMORY_REGION, {kind}, {mib} MiB", round(statistics.median(slots[kind, mib]), 3), "ms")
    # Each run less what the call took in that very run; it grows with the size where the MMU is shadowed.
    net = {key: statistics.median(time - slot for time, slot in zip(times, slots[key], strict=True)) for key, times in whole.items()}
    least, most = (net["floor", mib] for mib in sizes)
    yield Figure("floor of 16 GiB less its slot's time", round(most, 3), "ms", f"128 MiB {least:.3f} ms", round(most / least, 3))
    least, most = (net["restore", mib] for mib in sizes)
    yield compared("restore of 16 GiB less its slot's time", most, "ms", "128 MiB", least, 1.1)


def _unpack(runs: int) -> Iterator[Figure]:
    """Content is what lies in this machine's libraries; everything is on tmpfs, so that no disk is measured."""
    cores = os.cpu_count() or 1
    size = 256 << 20
    rates, times = [], []
    with _scratch(_TMPFS) as directory:
        source, packed = directory / "source", directory / "source.lz4"
        with source.open("wb") as out:
            for path in sorted(Path("/usr/lib/x86_64-linux-gnu").glob("*.so*")):
                if path.is_file() and not path.is_symlink() and out.tell() < size:
                    out.write(path.read_bytes())
        process.run(["lz4", "-q", "-1", source, packed])
        # In turns, so that both see the same machine weather.
        for _ in range(5):
            each = max(2, runs // 5)
            found = _json([program("ovms-bench-unpack"), source, directory, str(cores), str(each)])[0]
            (directory / "blob").unlink()
            rates += [found["memory"] / us for us in found["unpack_us"]]
            for _ in range(each):
                began = time.perf_counter()
                process.run(["lz4", "-q", "-d", "-f", packed, directory / "out"])
                times.append(time.perf_counter() - began)
                (directory / "out").unlink()
        rate = statistics.median(rates)
        reference = source.stat().st_size / statistics.median(times) / 1e6
    yield Figure(f"unpack of a RAM blob on {cores} cores", round(rate), "MB/s", f"lz4 -dc {reference:.0f} MB/s", round(rate / reference, 3),
                 f"ratio >= {0.8 * cores}", rate >= 0.8 * cores * reference)


def _ram_image(bed: Bed, args: str, mib: int) -> str:
    """An image of a guest that waits to be restored, in the local store and in containerd."""
    layout = bed.dir / f"resume-{mib}"
    process.run([program("ovm"), "build", "--kernel", _guest("resume"), "--args", args or "bare", "--name", "resume", "--version", "1",
                 "--tag", "localhost/resume:1", "--memory", f"{mib}M", "-o", layout], env=bed.ovms.env)
    base = bed.registry.push(layout, f"resume{mib}:1", "--preserve-digests")
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", base)
    console = bed.dir / "origin.console"
    bed.vm(base, "origin", "-d", "--log-uri", f"file://{console}")
    bed.await_console(console, "waiting")
    ref = bed.registry.ref(f"resume{mib}:ram")
    bed.ovms.ovm("snapshot", f"{bed.namespace}/origin", "-t", ref)
    bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "origin")
    bed.await_state("origin", "STOPPED")
    bed.containerd.ctr("task", "delete", "origin", status=None)
    bed.containerd.ctr("containers", "delete", "origin")
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)
    return ref


def _timed(body: Callable[[], object]) -> float:
    began = time.perf_counter()
    body()
    return (time.perf_counter() - began) * 1000


def _images(runs: int) -> Iterator[Figure]:
    with native_bed() as bed:
        image = _ram_image(bed, "", 2048)
        bed.containerd.import_layout(bed.ordinary(oci.busybox()))
        ordinary = next(name for name in bed.image_names() if "busybox" in name)
        ours, theirs = [], []
        # The first pair unpacks and warms up, and is not counted.
        for run in range(runs + 1):
            pair = (_timed(lambda run=run: bed.vm(image, f"vm{run}", "--rm")),
                    _timed(lambda run=run: bed.containerd.ctr("run", "--rm", ordinary, f"runc{run}", "/bin/true")))
            if run:
                ours.append(pair[0])
                theirs.append(pair[1])
        yield compared("ctr run --rm of a RAM-snapshot image, 2 GiB", statistics.median(ours), "ms",
                       "runc with true", statistics.median(theirs), 1.0)
        bed.ovms.ovm("pull", image)
        times = [_first_byte(bed, image) for _ in range(runs * 5 + 1)][1:]
        yield Figure("ovm run of a RAM-snapshot image to the first guest byte, 2 GiB", round(statistics.median(times), 3), "ms")
        yield _fast_enough("ovm run of a RAM-snapshot image to the first guest byte, 2 GiB", times, 10)


def _first_byte(bed: Bed, image: str) -> float:
    """Milliseconds from the start of the command to the guest's first byte."""
    reader, writer = os.pipe()
    try:
        began = time.perf_counter()
        child = process.spawn([str(program("ovm")), "run", image], stdout=writer, env=os.environ | bed.ovms.env)
        os.close(writer)
        byte = os.read(reader, 1)
        took = (time.perf_counter() - began) * 1000
        status = child.wait()
    finally:
        os.close(reader)
    if byte != b"x" or status != 0:
        raise CaseFailed(f"ovm run said {byte!r} and ended with {status}")
    return took


def _clones() -> Iterator[Figure]:
    """A hundred clones of 256 MiB under containerd, each having dirtied 1 MiB."""
    count, dirtied = 100, 1
    with native_bed() as bed:
        image = _ram_image(bed, f"fill=64 touch={dirtied} stay=1", 256)
        names = [f"vm{number}" for number in range(count)]
        # The first one warms up what all share.
        bed.vm(image, "first", "-d", "--null-io")
        time.sleep(2)
        before = _available_mib()
        for name in names:
            bed.vm(image, name, "-d", "--null-io")
        time.sleep(2)
        # What the kernel holds for a machine (shadow page tables, tasks, sockets) is in no process's figures.
        host = (before - _available_mib()) / count
        vmms = [bed.containerd.task_pid(name) for name in names[::10]]
        vmm = statistics.mean(memory.whole_mib(pid) for pid in vmms)
        shims = [pid for pid, name in process.descendants().items() if "containerd-shim-ovms-v1" in name][::10]
        shim = statistics.mean(memory.whole_mib(pid) for pid in shims)
        yield bounded(f"one of {count} clones of 256 MiB beyond the {dirtied} MiB it dirtied", vmm - dirtied, "MiB PSS", 4.5)
        yield bounded(f"memory that the host lacks for each of {count} clones, shim and kernel included, beyond what it dirtied", host - dirtied,
                      "MiB", 8.5)
        yield bounded(f"shim of one of {count} clones", shim, "MiB PSS", 4)


def _available_mib() -> float:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(text.split("MemAvailable:")[1].split()[0]) / 1024


#: MiB.
_SIZES = (128, 512, 2048, 8192)
#: MB/s that the guest writes at most: for clones of a file on disk the promise ends there.
_WRITTEN = 100
_UNBOUNDED = 0


def _standstill() -> Iterator[Figure]:
    for kind, where, below in (("booted", "", _TMPFS), ("clone", ", RAM on tmpfs", _TMPFS), ("clone", ", RAM on disk", _DISK)):
        for mib in _SIZES:
            yield from _stood(kind, where, below, mib, _WRITTEN)
    yield from _stood("clone", ", RAM on disk", _DISK, 2048, _UNBOUNDED)


def _stood(kind: str, where: str, below: str, mib: int, most: int) -> Iterator[Figure]:
    # Half of it in the guest, as much in the file that it is restored from, and the blob.
    if _available_mib() < mib * 1.5:
        print(f"stand-still for a snapshot of {mib} MiB: not measured: there is too little memory", flush=True)
        return
    with _scratch(below) as directory:
        argv = [program("ovms-bench-still"), program("ovms-vmm"), _guest("tally"), str(mib << 20), kind, directory, str(most), "3"]
        reports = _json(argv)
    worst = max(report["report"]["stood_micros"] for report in reports) / 1000
    rate = statistics.median(report["rate"] for report in reports)
    name = f"stand-still for a snapshot, {kind}{where}, {mib} MiB half dirty, guest writes {rate:.0f} MB/s"
    yield Figure(name, round(worst, 3), "ms") if most == _UNBOUNDED else bounded(name, worst, "ms", 10)
