"""RAM snapshots: what a restore costs beside its floor, how long a guest stands still, what a hundred clones cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.measures import memory
from bench.measures.beds import native_bed
from bench.measures.disks import held_disk
from bench.measures.start import AHEAD
from bench.report import Figure, bounded, compared, skipped
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
    yield from _of_containerd(runs // 4 + 1)
    yield from _checkpoints(runs // 4 + 1)


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


def _restore(mib: int, fill: int, runs: int, *flags: str, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `ovms-bench-restore` says of a guest of which `fill` MiB hold something."""
    with _scratch(_DISK) as directory:
        found: dict[str, Any] = _json([*prefix, program("ovms-bench-restore"), program("ovms-vmm"), program("ovms-bench-floor"),
                                       _guest("resume"), str(mib << 20), str(fill), str(runs), directory, *flags])[0]
    return found


def _shadowed() -> bool:
    """Whether KVM keeps page tables of its own for guests: neither EPT nor NPT."""
    switches = [Path("/sys/module", module, "parameters", name) for module, name in (("kvm_intel", "ept"), ("kvm_amd", "npt"))]
    return not any(switch.exists() and switch.read_text(encoding="ascii").strip() in ("Y", "1") for switch in switches)


def _fast_enough(name: str, times: list[float], most: float) -> Figure:
    """A figure for `_MOST` of the runs."""
    times = sorted(times)
    value = times[max(0, round(len(times) * _MOST) - 1)]
    return Figure(name, round(value, 3), "ms", "", None, f"{round(_MOST * 100)} of 100 runs < {most} ms", value < most)


def _restores(runs: int) -> Iterator[Figure]:
    for flags, suffix in (((), ""), (("mlock",), ", mlock_required")):
        found = _restore(2048, 512, runs, *flags)
        restores, floors, aheads = ([us / 1000 for us in found[key]] for key in ("restore_us", "floor_us", "ahead_us"))
        name = f"restore to the first guest byte, 2 GiB{suffix}"
        yield compared(name, statistics.median(restores), "ms", "floor program", statistics.median(floors), 2.0)
        yield _fast_enough(name, restores, 10)
        worst = 10 + max(floors)
        yield Figure(f"{name}, worst of {len(restores)}", round(max(restores), 3), "ms", "", None,
                     f"<= 10 ms + the floor's worst, {max(floors):.3f} ms", max(restores) <= worst)
        yield Figure(f"{AHEAD}{suffix}", round(statistics.median(aheads), 3), "ms")
    count = 200
    rate = count / _restore(256, 1, count, "keep", prefix=("taskset", "-c", "0"))["all_us"] * 1e6
    yield Figure(f"restores of 256 MiB on one core, {count} machines of one engine process kept", round(rate), "a second", "", None, ">= 200", rate >= 200)
    yield from _sizes(max(4, runs // 10))


def _sizes(runs: int) -> Iterator[Figure]:
    """What a restore costs at 16 GiB beside 128 MiB."""
    sizes = (128, 16384)
    whole: dict[tuple[str, int], list[float]] = {(kind, mib): [] for kind in ("restore", "floor") for mib in sizes}
    slots: dict[tuple[str, int], list[float]] = {key: [] for key in whole}
    # In turns, so that both sizes see the same machine weather.
    for _ in range(5):
        for mib in sizes:
            found = _restore(mib, 64, runs)
            for kind in ("restore", "floor"):
                whole[kind, mib] += [us / 1000 for us in found[f"{kind}_us"]]
            steps = found["steps_us"]
            slots["restore", mib] += [(after - before) / 1000 for before, after in zip(steps["vm"], steps["slots"], strict=True)]
            slots["floor", mib] += [us / 1000 for us in found["floor_slot_us"]]
    for (kind, mib), times in whole.items():
        yield Figure(f"{kind} to the first guest byte, {mib} MiB", round(statistics.median(times), 3), "ms")
        yield Figure(f"of that KVM_SET_USER_MEMORY_REGION, {kind}, {mib} MiB", round(statistics.median(slots[kind, mib]), 3), "ms")
    # Where the MMU is shadowed, each run less what the call took in that very run: it grows with the size.
    shadowed = _shadowed()
    net = {key: statistics.median(time - shadowed * slot for time, slot in zip(times, slots[key], strict=True))
           for key, times in whole.items()}
    less = " less its slot's time" if shadowed else ""
    least, most = (net["floor", mib] for mib in sizes)
    yield Figure(f"floor of 16 GiB{less}", round(most, 3), "ms", f"128 MiB {least:.3f} ms", round(most / least, 3))
    least, most = (net["restore", mib] for mib in sizes)
    yield compared(f"restore of 16 GiB{less}", most, "ms", "128 MiB", least, 1.1)


def _unpack(runs: int) -> Iterator[Figure]:
    """Content is what lies in this machine's libraries; everything is on tmpfs, so that no disk is measured."""
    cores = os.cpu_count() or 1
    size = 256 << 20
    rates: dict[str, list[float]] = {"unpack_us": [], "verify_us": []}
    times = []
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
            for key, of in rates.items():
                of += [found["memory"] / us for us in found[key]]
            for _ in range(each):
                began = time.perf_counter()
                with (directory / "out").open("wb") as out:
                    subprocess.run(["lz4", "-q", "-dc", packed], stdout=out, check=True)
                times.append(time.perf_counter() - began)
                (directory / "out").unlink()
        rate, verified = (statistics.median(of) for of in rates.values())
        reference = source.stat().st_size / statistics.median(times) / 1e6
    yield Figure(f"unpack of a RAM blob on {cores} cores", round(rate), "MB/s", f"lz4 -dc {reference:.0f} MB/s", round(rate / reference, 3),
                 f"ratio >= {0.8 * cores}", rate >= 0.8 * cores * reference)
    yield Figure("the same with the blob's SHA-256", round(verified), "MB/s", f"lz4 -dc {reference:.0f} MB/s", round(verified / reference, 3))


def _ram_image(bed: Bed, args: str, mib: int, *flags: str) -> str:
    """An image of a guest that waits to be restored, in the local store and in containerd. `flags` are those of `ovm snapshot`."""
    tag = f"resume{mib}{''.join(flags)}"
    layout = bed.dir / tag
    process.run([program("ovm"), "build", "--kernel", _guest("resume"), "--args", args or "bare", "--name", "resume", "--version", "1",
                 "--tag", "localhost/resume:1", "--memory", f"{mib}M", "-o", layout], env=bed.ovms.env)
    base = bed.registry.push(layout, f"{tag}:1", "--preserve-digests")
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", base)
    console = bed.dir / f"{tag}.console"
    bed.vm(base, "origin", "-d", "--log-uri", f"file://{console}")
    bed.await_console(console, "waiting")
    ref = bed.registry.ref(f"{tag}:ram")
    bed.ovms.ovm("snapshot", f"{bed.namespace}/origin", "-t", ref, *flags)
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
        bed.containerd.import_layout(bed.ordinary(oci.busybox()))
        ordinary = next(name for name in bed.image_names() if "busybox" in name)
        for flags, suffix in (((), ""), (("--mlock",), ", mlock_required")):
            image = _ram_image(bed, "fill=512", 2048, *flags)
            ours, theirs = [], []
            # The first pair unpacks and warms up, and is not counted.
            for run in range(runs + 1):
                pair = (_timed(lambda run=run, image=image: bed.vm(image, f"vm{run}", "--rm")),
                        _timed(lambda run=run: bed.containerd.ctr("run", "--rm", ordinary, f"runc{run}", "/bin/true")))
                if run:
                    ours.append(pair[0])
                    theirs.append(pair[1])
            yield compared(f"ctr run --rm of a RAM-snapshot image, 2 GiB{suffix}", statistics.median(ours), "ms",
                           "runc with true", statistics.median(theirs), 1.0)
            bed.ovms.ovm("pull", image)
            yield from _first_bytes(bed, image, runs * 5, suffix)


def _first_bytes(bed: Bed, image: str, runs: int, suffix: str) -> Iterator[Figure]:
    """`ovm run` from the start of the command to the guest's first byte; cgroups of version 1 stand beside it."""
    argv = [str(program("ovms-bench-run")), str(runs), str(program("ovm")), "run", image]
    found = json.loads(process.run(argv, timeout=600, env=os.environ | bed.ovms.env).out)
    host, unified = ([us / 1000 for us in found[key]] for key in ("host_us", "unified_us"))
    times = unified or host
    name = f"ovm run of a RAM-snapshot image to the first guest byte, 2 GiB{suffix}"
    yield Figure(name, round(statistics.median(times), 3), "ms")
    yield _fast_enough(name, times, 10)
    if unified:
        added = statistics.median(host) - statistics.median(unified)
        yield Figure(f"what a cgroup in each hierarchy of version 1 adds to that{suffix}", round(added, 3), "ms")


def _clones() -> Iterator[Figure]:
    """A hundred clones of 256 MiB under containerd, each having dirtied 1 MiB."""
    count, dirtied = 100, 1
    for flags, suffix in (((), ""), (("--mlock",), ", mlock_required")):
        with native_bed() as bed:
            image = _ram_image(bed, f"fill=64 touch={dirtied} stay=1", 256, *flags)
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
        beyond = f"beyond the {dirtied} MiB it dirtied{suffix}"
        yield bounded(f"one of {count} clones of 256 MiB {beyond}", vmm - dirtied, "MiB PSS", 4.5)
        yield bounded(f"memory that the host lacks for each of {count} clones, KVM's own included, without its shim, {beyond}",
                      host - shim - dirtied, "MiB", 4.5)
        yield bounded(f"shim of one of {count} clones{suffix}", shim, "MiB PSS", 4)


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
            yield _stood(kind, where, below, mib, _WRITTEN)
            if below == _TMPFS:
                yield _stood(kind, where, below, mib, _UNBOUNDED)
    yield _stood("clone", ", RAM on disk", _DISK, 2048, _UNBOUNDED)
    yield _stood("clone", ", RAM on tmpfs, mlock_required", _TMPFS, 2048, _UNBOUNDED, "mlock")
    yield _stood("clone", ", RAM on disk, mlock_required", _DISK, 2048, _WRITTEN, "mlock")


def _stood(kind: str, where: str, below: str, mib: int, most: int, *flags: str) -> Figure:
    name = f"stand-still for a snapshot, {kind}{where}, {mib} MiB half dirty"
    # Half of it in the guest, as much in the file that it is restored from, and the blob.
    if _available_mib() < mib * 1.5:
        return skipped(name, "there is too little memory")
    with _scratch(below) as directory:
        argv = [program("ovms-bench-still"), program("ovms-vmm"), _guest("tally"), str(mib << 20), kind, directory, str(most), "3", *flags]
        reports = _json(argv)
    worst = max(report["report"]["stood_micros"] for report in reports) / 1000
    rate = statistics.median(report["rate"] for report in reports)
    name += f", guest writes {'all it can, ' if most == _UNBOUNDED else ''}{rate:.0f} MB/s, worst of {len(reports)}"
    # A clone of a file on disk whose guest writes more is measured, and nothing promised.
    promised = most != _UNBOUNDED or below == _TMPFS
    return bounded(name, worst, "ms", 10) if promised else Figure(name, round(worst, 3), "ms")


def _of_containerd(runs: int) -> Iterator[Figure]:
    """How long the guest stands while it writes to its disk, for snapshots of a machine that containerd started."""
    with native_bed() as bed:
        console = bed.detached("tally", "vm")
        words = [bed.ovms.ovm("snapshot", f"{bed.namespace}/vm", "-t", f"localhost/stood:{run}", "-o", str(bed.dir / f"stood{run}")).text
                 for run in range(runs)]
        stood = [float(re.search(r"stood still for ([0-9.]+) ms", text)[1]) for text in words]  # type: ignore[index]
        bed.await_console(console, "count ")
        yield bounded(f"stand-still for ovm snapshot of a machine of containerd's that writes to its disk, worst of {runs}", max(stood), "ms", 10)


#: MB/s of a disk that is slower than lz4 on two cores.
_HELD = 100


def _checkpoints(runs: int) -> Iterator[Figure]:
    """How fast `ctr task checkpoint` saves a machine, beside its blob written and synced on the same disk."""
    with native_bed() as bed:
        layout = bed.dir / "filled"
        # What it writes compresses to about half.
        process.run([program("ovm"), "build", "--kernel", _guest("dirty"), "--args", "mib=96 fill=1 rate=1", "--name", "filled",
                     "--version", "1", "--tag", "localhost/filled:1", "--memory", "128M", "-o", layout], env=bed.ovms.env)
        image = bed.import_for_ovms(layout)
        console = bed.dir / "filled.console"
        bed.vm(image, "vm", "-d", "--log-uri", f"file://{console}")
        bed.await_console(console, "dirty")
        name = "ctr task checkpoint of 128 MiB, 96 of them written"
        try:
            with held_disk(bed.dir, 512, _HELD) as disk:
                saved, written, size = _checkpointed(bed, disk, runs)
                yield compared(f"{name}, to a blob of {size >> 20} MiB on a disk held to {_HELD} MB/s", saved, "ms",
                               "the same bytes written and synced", written, 1.1)
        except CaseSkipped as reason:
            yield skipped(f"{name}, to a disk held to {_HELD} MB/s", str(reason))
        # Where the disk is faster, the processors' share is seen: no goal, since it depends on how many there are.
        saved, written, size = _checkpointed(bed, bed.dir, runs)
        yield Figure(f"{name}, to a blob of {size >> 20} MiB on this disk", round(saved, 1), "ms",
                     f"the same bytes written and synced {written:.1f} ms", round(saved / written, 3))


def _checkpointed(bed: Bed, below: Path, runs: int) -> tuple[float, float, int]:
    """The medians of a checkpoint of `vm` into `below`, and of its blob written there once more, in milliseconds; the blob's bytes."""
    saved, written, size = [], [], 0
    for run in range(runs):
        into = below / f"saved{run}"
        saved.append(_timed(lambda into=into: bed.containerd.ctr("task", "checkpoint", "--image-path", into, "vm")))
        blob = (into / "ram").read_bytes()
        size = len(blob)
        written.append(_timed(lambda into=into, blob=blob: _write(into / "copy", blob)))
        shutil.rmtree(into)
        # ctr names what it makes by the second.
        time.sleep(1.1)
    return statistics.median(saved), statistics.median(written), size


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
