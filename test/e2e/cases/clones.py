"""Images that carry RAM: taken with `ovm snapshot`, distributed by a registry, resumed by containerd and by `ovm run`."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e.harness import cgroups, files, forgery, picture, process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
from e2e.harness.terminal import Session

_COLD = ("--annotation", "io.ovms.boot=cold")


@case(guests=("native",))
def three_clones_go_on_from_one_count(bed: Bed) -> None:
    """Taken while it runs, pushed, pulled and run three times: the same count, memory and disk of one instant, bases as they were."""
    base = bed.registry.push(bed.guests.layout("tally"), "tally:1", "--preserve-digests")
    origin = tally.start(bed, tally.pull(bed, base), "origin", *tally.SMALL)
    before = tally.await_counts(bed, origin)
    tally.snapshot(bed, "origin", bed.registry.ref("ram:1"))
    tally.await_counts(bed, origin)
    tally.end(bed, "origin", origin)
    image = tally.pull(bed, bed.registry.ref("ram:1"))
    tally.await_ram(bed)
    before_clones = bed.hashes(ram=True)

    consoles = {name: tally.start(bed, image, name) for name in ("one", "two", "three")}

    firsts = {name: tally.first(console) for name, console in consoles.items()}
    check(len(set(firsts.values())) == 1 and min(firsts.values()) >= before, f"{firsts}, the origin was at {before}")
    for name, console in consoles.items():
        tally.end(bed, name, console)
    bed.unchanged(before_clones)
    bed.nothing_half_made()


@case(guests=("native",))
def the_timeline_of_a_restore_is_logged(bed: Bed) -> None:
    """containerd's log has the steps of the start."""
    image, _ = tally.image_with_ram(bed)

    console = tally.start(bed, image, "one")

    tally.end(bed, "one", console)
    lines = [line for line in bed.containerd.log.splitlines() if "the guest lives" in line]
    check(lines, "there is no time line in the log")
    for step in ("resolved", "spawned", "vmm map", "vmm sections", "vmm first exit"):
        contains(lines[-1], step, "the time line")


@case(guests=("native",), seconds=90)
def a_clone_of_a_clone_is_snapshotted(bed: Bed) -> None:
    """Twice in a row: each image holds only what changed against the one before, and the last one runs by itself."""
    image, count = tally.image_with_ram(bed)
    chains = [_ram_blobs(bed, image)]
    whole = forgery.chunks(bed.registry.blob(image, chains[0][0]))
    for generation in (2, 3):
        name = f"clone{generation}"
        console = tally.start(bed, image, name)
        check(tally.first(console) >= count, f"generation {generation} began at {tally.first(console)}, not behind {count}")
        count = tally.await_counts(bed, console)
        ref = bed.registry.ref(f"ram:{generation}")
        tally.snapshot(bed, name, ref)
        ticks = len(tally.said(console))
        tally.await_counts(bed, console)
        tally.end(bed, name, console)
        bed.containerd.ctr("images", "rm", "--sync", image)
        image = tally.pull(bed, ref)
        chains.append(_ram_blobs(bed, ref))
        stored = forgery.chunks(bed.registry.blob(ref, chains[-1][0]))
        # 16 pages a tick are up to two chunks; beside them the guest writes its own data, its stack and the disk's queue.
        most = 2 * (ticks + 1) + 16
        check(0 < len(stored) <= most < len(whole), f"generation {generation} ticked {ticks} times and stores {len(stored)} chunks of "
              f"{len(whole)}, at most {most} can have changed")

    console = tally.start(bed, image, "last")

    check(tally.first(console) >= count, f"the last one began at {tally.first(console)}, not behind {count}")
    tally.end(bed, "last", console)
    for below, chain in itertools.pairwise(chains):
        check(chain[1:] == below and chain[0] not in below, f"the RAM blobs of the images are {chains}")


def _ram_blobs(bed: Bed, ref: str) -> list[str]:
    """Digests of the RAM blobs of an image in the registry: its own, then those below it, the nearest first."""
    manifest, _ = bed.registry.manifest(ref)
    listed = {layer["digest"] for layer in manifest["layers"] if "ramsnap" in layer["mediaType"]}
    machine = next(layer["digest"] for layer in manifest["layers"] if layer["mediaType"] == "application/vnd.ovms.manifest.v1+json")
    chain = [json.loads(bed.registry.blob(ref, machine))["ramSnapshot"]["ref"]]
    while parent := forgery.head_of(bed.registry.blob(ref, chain[-1])).get("parent"):
        chain.append(parent)
    check(set(chain) == listed, f"the image lists the RAM blobs {listed}, its chain is {chain}")
    return chain


@case(guests=("native",))
def cold_boot_by_annotation(bed: Bed) -> None:
    """`io.ovms.boot=cold` boots the same image: it counts from 0, on the disk of the snapshot."""
    image, _ = tally.image_with_ram(bed)

    console = tally.start(bed, image, "cold", *_COLD, *tally.SMALL)

    check(tally.first(console) == 0, f"it began at {tally.first(console)}")
    tally.end(bed, "cold", console)


@case(guests=("native",), containerds=("containerd-2.4",))
def unknown_annotations_of_ram_are_refused(bed: Bed) -> None:
    """A misspelt wish is named, not ignored."""
    image = bed.import_vm("poweroff")

    for wish in ("io.ovms.boot=warm", "io.ovms.on-incompatible=ignore"):
        bed.refused(lambda wish=wish: bed.vm(image, "vm", "--rm", "--annotation", wish, status=None), wish)


@case(guests=("native",), containerds=("containerd-2.4",))
def the_hosts_policy_decides(bed: Bed) -> None:
    """`[ram] policy`: deny and signed refuse an image with RAM and say the way out; a cold boot needs no permission."""
    image, before = tally.image_with_ram(bed)

    for policy in ("deny", "signed"):
        bed.ovms.write_settings(extra=f'[ram]\npolicy = "{policy}"\n')
        bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None), f'[ram] policy = "{policy}"', "io.ovms.boot=cold")
        console = tally.start(bed, image, policy, *_COLD, *tally.SMALL)
        check(tally.first(console) == 0, f"it began at {tally.first(console)}")
        tally.end(bed, policy, console)
    bed.ovms.write_settings()
    console = tally.start(bed, image, "vm")
    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    tally.end(bed, "vm", console)


@case(guests=("native",))
def overrides_do_not_change_the_saved_state(bed: Bed) -> None:
    """Less memory than the snapshot's is refused by name; more of it, vCPUs and kernel arguments have no effect; limits of the
    group apply."""
    image, before = tally.image_with_ram(bed)
    for who, flags in (
        ("the spec's memory limit", ("--memory-limit", str(48 << 20))),
        ("annotation io.ovms.memory", ("--annotation", "io.ovms.memory=48M")),
    ):
        sentence = (f"{who} allows {48 << 20} bytes of memory, the machine in the RAM snapshot has {64 << 20}: allow as much, or boot it "
                    "with the annotation io.ovms.boot=cold")
        bed.refused(lambda flags=flags: bed.vm(image, "vm", "--rm", *flags, status=None), sentence)

    wishes = ("--memory-limit", str(256 << 20), "--cpus", "1.5", "--annotation", "io.ovms.vcpus=4",
              "--annotation", "io.ovms.kernel-args=count=1 fill=1")
    console = tally.start(bed, image, "vm", *wishes)

    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    record = json.loads((bed.ovms.runtime / "machines" / bed.namespace / "vm/record.json").read_bytes())
    check((record["vcpus"], record["memory"]) == (1, 64 << 20), f"it has {record['vcpus']} vCPUs and {record['memory']} bytes of memory")
    pid = bed.containerd.task_pid("vm")
    # The group also has what the VMM itself needs.
    limit = cgroups.memory_limit(cgroups.memory_group(pid))
    check(limit == (256 + 64) << 20, f"its group may use {limit} bytes")
    check(cgroups.cpu_limit(pid) == 1.5, f"its group may use {cgroups.cpu_limit(pid)} processors")
    contains(bed.containerd.log, "kernel arguments given with a RAM snapshot have no effect", "containerd's log")
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=())
def ovm_run_resumes(bed: Bed) -> None:
    """`ovm run -d`, `snapshot`, `ps`, `stop`, `rm` and again `run`, with no daemon at all."""
    bed.ovms.ovm("run", "-d", "--name", "origin", "--memory", "64M", bed.guests.layout("tally"))
    contains(bed.ovms.ovm("ps").out, "origin", "ovm ps")
    process.until("it counts", lambda: "count 3" in bed.ovms.ovm("logs", "origin").out, bed.patience)
    bed.ovms.ovm("snapshot", "origin", "-t", "ram:1")
    bed.ovms.ovm("stop", "origin")
    bed.ovms.ovm("rm", "origin")
    firsts = []

    for _ in range(2):
        with Session([str(bed.ovms.program("ovm")), "run", "ram:1"], bed.ovms.env, tty=False,
                     patience=bed.patience * 2) as session:
            session.expect(r"count \d+\r?\n(.|\n)*count \d+\r?\n")
            firsts.append(tally.counts(session.text)[0])
            session.signal(signal.SIGTERM)
            session.expect("all good at")
            session.wait()

    check(firsts[0] == firsts[1] and firsts[0] > 0, f"they went on from {firsts}")
    check("origin" not in bed.ovms.ovm("ps").out, "the origin is still there")


@case(guests=("native",))
def through_the_local_store_and_back(bed: Bed) -> None:
    """`ovm snapshot` into the local store, `ovm push`, `ovm pull` and `ovm run`."""
    base = bed.registry.push(bed.guests.layout("tally"), "tally:1", "--preserve-digests")
    console = tally.start(bed, tally.pull(bed, base), "vm", *tally.SMALL)
    before = tally.await_counts(bed, console)
    ref = bed.registry.ref("ram:1")
    tally.snapshot(bed, "vm", ref)
    tally.end(bed, "vm", console)

    bed.ovms.ovm("pull", ref)
    with Session([str(bed.ovms.program("ovm")), "run", ref], bed.ovms.env, tty=False, patience=bed.patience * 2) as session:
        session.expect(r"count \d+\r?\n(.|\n)*count \d+\r?\n")
        first = tally.counts(session.text)[0]
        session.signal(signal.SIGTERM)
        session.expect("all good at")
        session.wait()

    check(first >= before, f"it went on from {first}, the origin was at {before}")


@case(guests=("native",))
def a_snapshot_that_is_given_up_leaves_nothing(bed: Bed) -> None:
    """Ctrl-C to `ovm snapshot`: the machine goes on, and a later snapshot works."""
    base = bed.registry.push(bed.guests.layout("tally"), "tally:1", "--preserve-digests")
    console = tally.start(bed, tally.pull(bed, base), "vm", *tally.SMALL)
    argv = [str(bed.ovms.program("ovm")), "snapshot", f"{bed.namespace}/vm", "-t", bed.registry.ref("ram:1")]
    for delay in (0.0, 0.02, 0.1, 0.3):
        with Session(argv, bed.ovms.env, tty=False, patience=bed.patience) as session:
            time.sleep(delay)
            session.signal(signal.SIGINT)
            session.wait(status=None)
        tally.await_counts(bed, console)

    before = tally.await_counts(bed, console)
    tally.snapshot(bed, "vm", bed.registry.ref("ram:2"))
    tally.end(bed, "vm", console)

    clone = tally.start(bed, tally.pull(bed, bed.registry.ref("ram:2")), "clone")
    check(tally.first(clone) >= before, f"it began at {tally.first(clone)}, not behind {before}")
    tally.end(bed, "clone", clone)


def _sized(bed: Bed, memory: str) -> None:
    image, before = tally.image_with_ram(bed, memory=memory)

    for name in ("one", "two"):
        console = tally.start(bed, image, name)
        check(tally.first(console) >= before, f"{name} began at {tally.first(console)}, not behind {before}")
        tally.end(bed, name, console)


@case(guests=("native",), containerds=("containerd-2.4",))
def of_128_mib(bed: Bed) -> None:
    """A machine of 128 MiB."""
    _sized(bed, "128M")


@case(guests=("native",), containerds=("containerd-2.4",))
def of_2_gib(bed: Bed) -> None:
    """A machine of 2 GiB."""
    _sized(bed, "2G")


@case(guests=("native",), containerds=("containerd-2.4",), seconds=120)
def of_16_gib(bed: Bed) -> None:
    """A machine of 16 GiB, nearly all of it never touched: neither blob nor files grow with that."""
    _sized(bed, "16G")

    used = sum(path.stat().st_blocks * 512 for path in files.below(bed.ovms.state) if path.is_file())
    check(used < 256 << 20, f"the snapshotter's files take {used >> 20} MiB")


def _resumed_by_ovm_run(bed: Bed, memory: str) -> None:
    before = tally.stored_with_ram(bed, "ram:1", memory)

    firsts = [tally.resume(bed, "ram:1") for _ in range(2)]

    check(firsts[0] == firsts[1] >= before, f"they went on from {firsts}, the origin was at {before}")
    sizes = [path.stat() for path in bed.ovms.state.glob("cache/ram/*/memory")]
    check([found.st_size for found in sizes] == [_bytes(memory)], f"unpacked: {sizes}")
    used = sum(path.stat().st_blocks * 512 for path in files.below(bed.ovms.state) if path.is_file())
    check(used < 256 << 20, f"the files of ovm take {used >> 20} MiB")


def _bytes(text: str) -> int:
    """Bytes of a size like 2G."""
    return int(text[:-1]) << {"M": 20, "G": 30}[text[-1]]


@case(guests=("native",), containerds=())
def ovm_run_of_128_mib(bed: Bed) -> None:
    """`ovm run` resumes a machine of 128 MiB, twice from one count."""
    _resumed_by_ovm_run(bed, "128M")


@case(guests=("native",), containerds=())
def ovm_run_of_2_gib(bed: Bed) -> None:
    """The same of 2 GiB."""
    _resumed_by_ovm_run(bed, "2G")


@case(guests=("native",), containerds=(), seconds=120)
def ovm_run_of_16_gib(bed: Bed) -> None:
    """The same of 16 GiB, nearly all of it never touched: neither blob nor files grow with that."""
    _resumed_by_ovm_run(bed, "16G")


@case(guests=("native",), containerds=("containerd-2.4",), seconds=240)
def a_hundred_clones_at_once(bed: Bed) -> None:
    """A hundred machines go on from one snapshot beside each other."""
    image, before = tally.image_with_ram(bed)
    names = [f"vm{number}" for number in range(100)]

    for name in names:
        bed.vm(image, name, "-d", "--log-uri", f"file://{bed.dir / name}.console")
    consoles = {name: bed.dir / f"{name}.console" for name in names}
    process.until("all have counted", lambda: all(tally.said(console) for console in consoles.values()), bed.patience * 8)

    firsts = {tally.first(console) for console in consoles.values()}
    check(len(firsts) == 1 and min(firsts) >= before, f"they began at {firsts}, the origin was at {before}")
    check(bed.containerd.tasks() == dict.fromkeys(names, "RUNNING"), f"tasks: {bed.containerd.tasks()}")
    for name in names:
        bed.containerd.ctr("task", "kill", "-s", "SIGKILL", name)
    for name in names:
        bed.await_state(name, "STOPPED")
        bed.containerd.delete_task(name, 137)
        bed.containerd.ctr("containers", "delete", name)
    bed.nothing_half_made()


@case(guests=("native",))
def removed_with_its_last_user(bed: Bed) -> None:
    """What RAM was unpacked to stays as long as a machine or an image needs it, and not longer."""
    image, _ = tally.image_with_ram(bed)
    console = tally.start(bed, image, "vm")

    bed.containerd.ctr("images", "rm", "--sync", image)
    check(tally.unpacked(bed), "the RAM of a running machine was removed")
    tally.await_counts(bed, console)
    tally.end(bed, "vm", console)
    for name in bed.image_names():
        bed.containerd.ctr("images", "rm", "--sync", name)

    process.until("the RAM is gone", lambda: not tally.unpacked(bed), bed.patience)


@case(guests=("native",), containerds=("containerd-2.4",))
def its_manifest_says_what_it_is(bed: Bed) -> None:
    """The image is the base with a diff and RAM on top; `subject` is the base, and the base's layers are not sent again."""
    base = bed.registry.push(bed.guests.layout("tally"), "vm:1", "--preserve-digests")
    console = tally.start(bed, tally.pull(bed, base), "vm", *tally.SMALL)
    ref = bed.registry.ref("vm:2")
    sent_before = bed.registry.uploaded()

    tally.snapshot(bed, "vm", ref)

    tally.end(bed, "vm", console)
    (manifest, _), (bottom, subject) = bed.registry.manifest(ref), bed.registry.manifest(base)
    disks = [layer for layer in bottom["layers"] if "image.layer" in layer["mediaType"]]
    layers = [layer for layer in manifest["layers"] if "image.layer" in layer["mediaType"]]
    check(len(disks) == 3 and layers[:3] == disks and len(layers) == 5, f"above the layers {disks} it has {layers}")
    check(manifest.get("subject") == subject, f"the subject is {manifest.get('subject')}, the base {subject}")
    theirs, ours = ([layer["digest"] for layer in (*one["layers"], one["config"])] for one in (bottom, manifest))
    check(sorted(sent_before) == sorted(theirs), f"the base was sent as {sent_before}")
    sent = bed.registry.uploaded()[len(sent_before):]
    check(sorted(sent) == sorted(set(ours) - set(theirs)), f"{sent} were sent, of {ours} on {theirs}")


def _needs(pointer: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """An edit that changes one field of a blob's head, given what it was."""
    def edit(blob: Path) -> None:
        value: Any = forgery.head(blob)
        for name in pointer.strip("/").split("/"):
            value = value[name]
        forgery.with_head(pointer, change(value))(blob)

    return edit


def _with_amx(cpuid: list[dict[str, int]]) -> list[dict[str, int]]:
    """CPUID of a guest that was shown AMX-TILE (leaf 7, EDX bit 24), which no KVM without the hardware offers."""
    for entry in cpuid:
        if (entry["function"], entry["index"]) == (7, 0):
            entry["edx"] |= 1 << 24
    return cpuid


@case(guests=("native",), containerds=("containerd-2.4",), seconds=90)
def an_incompatible_host_is_told_what_lacks(bed: Bed) -> None:
    """A missing CPU feature or capability fails by its name; `io.ovms.on-incompatible=boot` boots instead."""
    image, _ = tally.image_with_ram(bed)
    for tag, edit, named in (
        ("feature", _needs("/fingerprint/cpuid", _with_amx), "amx"),
        ("capability", _needs("/fingerprint/capabilities", lambda have: [*have, "teleport"]), "teleport"),
    ):
        forged = tally.pull(bed, forgery.image(bed, image, tag, edit))

        bed.refused(lambda forged=forged: bed.vm(forged, "vm", "--rm", status=None), named, "found")

        console = tally.start(bed, forged, tag, "--annotation", "io.ovms.on-incompatible=boot", *tally.SMALL)
        check(tally.first(console) == 0, f"it began at {tally.first(console)}")
        tally.end(bed, tag, console)


def _flipped(at: int) -> Callable[[Path], None]:
    def edit(blob: Path) -> None:
        data = bytearray(blob.read_bytes())
        data[at] ^= 0x40
        blob.write_bytes(data)

    return edit


def _cut(to: int) -> Callable[[Path], None]:
    def edit(blob: Path) -> None:
        blob.write_bytes(blob.read_bytes()[:to])

    return edit


@case(guests=("native",), containerds=("containerd-2.4",), seconds=120)
def damaged_ram_is_refused(bed: Bed) -> None:
    """Flipped, cut or forged: an image whose RAM cannot be right makes no machine, and nothing else on the host minds."""
    image, before = tally.image_with_ram(bed)
    damages: dict[str, Callable[[Path], None]] = {
        "magic": _flipped(0), "epoch": _flipped(8), "offset": _flipped(17), "first-chunk": _flipped(64), "tail": _flipped(-1),
        "empty": _cut(0), "prefix": _cut(40), "half": _cut(4096), "last-byte": _cut(-1),
        "memory": forgery.with_head("/memory", 1 << 43), "odd-memory": forgery.with_head("/memory", 12345),
        "vcpus": forgery.with_head("/vcpus", 900),
    }
    for name, edit in damages.items():
        forged = forgery.image(bed, image, name, edit)
        before_pull = picture.take(bed)
        pulled = bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", forged, status=None)
        if name == "empty":
            # containerd itself does not take a blob of no bytes. Any other is no layer, and nobody looks into it before it is unpacked.
            bed.failed(pulled)
            bed.await_picture(before_pull, "the pull")
            continue
        check(pulled.status == 0, f"{name}: the pull gave {pulled.text[-300:]!r}")
        done = bed.refused(lambda forged=forged: bed.vm(forged, "vm", "--rm", status=None))
        check("ovms-vmm" not in done.text or "cannot" in done.text, f"{name}: {done.text[-300:]!r}")
        bed.containerd.ctr("images", "rm", "--sync", forged)

    console = tally.start(bed, image, "vm")
    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    tally.end(bed, "vm", console)
