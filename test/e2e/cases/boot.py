"""A machine's start and end, with and without containerd."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
from e2e.harness.guests import DIFF_LINE
from e2e.harness.terminal import Session


def _ovm_run(bed: Bed, behaviour: str, *flags: str, tty: bool = False) -> Session:
    layout = bed.guests.layout(behaviour)
    argv = [str(bed.ovms.program("ovm")), "run", *flags, str(layout)]
    return Session(argv, bed.ovms.env, tty=tty, patience=bed.patience * 2)


@case(containerds=())
def ovm_run_boots_and_passes_the_exit_status(bed: Bed) -> None:
    """`ovm run LAYOUT` needs no daemon: console on stdout, exit status 0 after a power-off."""
    with _ovm_run(bed, "disk") as session:
        text = session.wait()

    contains(text, DIFF_LINE, "the guest's console")


@case(containerds=(), guests=("native",))
def ovm_run_of_a_crash_gives_134(bed: Bed) -> None:
    """A kernel panic is told from a power-off by pvpanic."""
    with _ovm_run(bed, "panic") as session:
        session.wait(status=134)


@case(containerds=(), guests=("native",))
def ovm_run_takes_input(bed: Bed) -> None:
    """What is typed reaches the guest's serial port and its answer comes back."""
    with _ovm_run(bed, "talk", tty=True) as session:
        session.expect(bed.guests.ready("talk"))
        _talk(bed, session)
        session.wait()


@case(containerds=())
def ovm_run_presses_the_power_button_on_sigterm(bed: Bed) -> None:
    """SIGTERM to `ovm run` gives the guest the chance to end by itself."""
    with _ovm_run(bed, "wait") as session:
        session.expect(bed.guests.ready("wait"))
        session.signal(signal.SIGTERM)
        contains(session.wait(), "power button", "the guest's console")


@case(containerds=())
def ovm_run_takes_memory_and_cpus(bed: Bed) -> None:
    """`--memory` and `--cpus` reach the guest."""
    with _ovm_run(bed, "memory", "--memory", "256M") as session:
        _check_memory(bed, session.wait(), 256)
    # The bare-metal guest waits for as many processors as its argument says.
    layout = bed.guests.layout("cpus", extra_args="cpus=3", name="three")
    done = bed.ovms.ovm("run", "--cpus", "3", layout)
    contains(done.out, "cpus 3", "the guest's console")


@case(guests=("native",))
def attached(bed: Bed) -> None:
    """`ctr run --rm` shows the console and exits 0 when the guest powers off."""
    image = bed.import_vm("poweroff")

    done = bed.vm(image, "vm", "--rm")

    contains(done.out, bed.guests.ready("poweroff"), "the guest's console")
    bed.nothing_half_made()


@case()
def with_a_terminal(bed: Bed) -> None:
    """`ctr run -t`: a conversation with the guest over a terminal."""
    image = bed.import_vm("talk")

    with bed.vm_session(image, "vm", "--rm", "-t") as session:
        session.expect(bed.guests.ready("talk"))
        _talk(bed, session)
        session.wait()


@case(guests=("native",))
def with_pipes(bed: Bed) -> None:
    """`ctr run` without a terminal passes its standard input on too."""
    image = bed.import_vm("talk")

    with bed.vm_session(image, "vm", "--rm") as session:
        session.expect(bed.guests.ready("talk"))
        _talk(bed, session)
        session.wait()


@case()
def detached(bed: Bed) -> None:
    """`ctr run -d` returns with the machine running; its console goes to the file that was asked for."""
    bed.detached("wait")

    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")
    bed.kill_and_delete()


@case(guests=("native",))
def console_through_a_binary_logger(bed: Bed) -> None:
    """`--log-uri binary://` starts the logger and hands it the console."""
    image = bed.import_vm("poweroff")
    log = bed.dir / "logged"
    logger = bed.dir / "logger"
    # Descriptor 3 is the console, 5 says that the logger is ready (containerd's runtime v2 README).
    logger.write_text(f"#!/bin/sh\nexec 5>&-\nexec cat <&3 >'{log}'\n", encoding="ascii")
    logger.chmod(0o755)

    bed.vm(image, "vm", "-d", "--log-uri", f"binary://{logger}")

    bed.await_state("vm", "STOPPED")
    bed.await_console(log, bed.guests.ready("poweroff"))


@case()
def reset_gives_0(bed: Bed) -> None:
    """A reset by the guest ends the machine with status 0."""
    bed.vm(bed.import_vm("reset"), "vm", "--rm", status=0)


@case()
def panic_gives_134(bed: Bed) -> None:
    """A kernel panic, told by pvpanic, ends the machine with status 134."""
    bed.vm(bed.import_vm("panic"), "vm", "--rm", status=134)


@case(guests=("native",))
def triple_fault_gives_139(bed: Bed) -> None:
    """A triple fault ends the machine with status 139."""
    bed.vm(bed.import_vm("triple"), "vm", "--rm", status=139)


@case()
def memory_limit_is_the_guests_memory(bed: Bed) -> None:
    """The container's memory limit becomes the guest's memory."""
    done = bed.vm(bed.import_vm("memory"), "vm", "--rm", "--memory-limit", str(192 << 20))

    _check_memory(bed, done.out, 192)


@case()
def annotations_set_vcpus_and_memory(bed: Bed) -> None:
    """`io.ovms.vcpus`, `io.ovms.memory` and `io.ovms.kernel-args` reach the guest."""
    size = ("--annotation", "io.ovms.vcpus=2", "--annotation", "io.ovms.memory=192M")

    # The bare-metal guest waits for as many processors as its argument says, and counts them.
    done = bed.vm(bed.import_vm("cpus"), "vm", "--rm", *size, "--annotation", "io.ovms.kernel-args=cpus=2")

    contains(done.out, "cpus 2", "the guest's console")
    _check_memory(bed, bed.vm(bed.import_vm("memory"), "vm", "--rm", *size).out, 192)


@case(guests=("native",))
def cpu_quota_sets_the_vcpus(bed: Bed) -> None:
    """`--cpus 1.5` gives two virtual CPUs."""
    done = bed.vm(bed.import_vm("cpus"), "vm", "--rm", "--cpus", "1.5", "--annotation", "io.ovms.kernel-args=cpus=2")

    contains(done.out, "cpus 2", "the guest's console")


@case(guests=("native",))
def image_defaults_set_vcpus_and_memory(bed: Bed) -> None:
    """What `ovm build --vcpus --memory` wrote into the image is used when nobody says otherwise."""
    size = ("--vcpus", "3", "--memory", "320M")
    memory, cpus = bed.dir / "memory", bed.dir / "cpus"
    bed.guests.build("memory", memory, name="sized-memory", flags=size)
    bed.guests.build("cpus", cpus, name="sized-cpus", extra_args="cpus=3", flags=size)

    _check_memory(bed, bed.vm(bed.import_for_ovms(memory), "vm", "--rm").out, 320)
    contains(bed.vm(bed.import_for_ovms(cpus), "vm", "--rm").out, "cpus 3", "the guest's console")


@case(guests=("native",))
def memory_beyond_the_hole(bed: Bed) -> None:
    """Memory above 4 GiB, behind the hole for devices, is there and holds what is written."""
    done = bed.vm(bed.import_vm("memory"), "vm", "--rm", "--annotation", "io.ovms.memory=6G")

    check("does not hold" not in done.out, f"memory is broken: {done.out}")
    top = re.search(r"top (0x[0-9a-f]+)", done.out)
    check(top and int(top[1], 16) > 4 << 30, f"no memory above 4 GiB: {done.out}")


@case(guests=("native",))
def many_vcpus(bed: Bed) -> None:
    """Thirty-two processors come up."""
    done = bed.vm(bed.import_vm("cpus"), "vm", "--rm", "--annotation", "io.ovms.vcpus=32", "--annotation", "io.ovms.kernel-args=cpus=32")

    contains(done.out, "cpus 32", "the guest's console")


@case()
def read_only_root_is_a_read_only_disk(bed: Bed) -> None:
    """`--read-only` makes the disk read-only."""
    image = bed.import_vm("disk")

    done = bed.vm(image, "vm", "--rm", "--read-only", status=None)

    if bed.guests.native:
        # It has read sector 0 by then, and writes.
        contains(done.text, "sector 0: ", "the guest's console")
        contains(done.text, "the disk failed a request", "the guest's console")
    else:
        contains(done.text, "disk is read-only", "the guest's console")


@case(guests=("native",))
def the_vmm_of_a_read_only_machine_can_write_no_file(bed: Bed) -> None:
    """With `--read-only` the VMM is given no file of the disk to write to; without it, its own top alone."""
    image = bed.import_vm("wait")

    for name, flags in (("writer", ()), ("reader", ("--read-only",))):
        bed.detached("wait", name, *flags, image=image)
        opened = _disk_files(bed, bed.containerd.task_pid(name))
        check([path for path in opened if path.endswith("/layer/data")], f"{name} has no layer open: {opened}")
        writable = sorted(path.rpartition("/s/")[2].partition("/")[2] for path, mode in opened.items() if mode != os.O_RDONLY)
        check(writable == ([] if flags else ["top/data", "top/map"]), f"{name} may write to {writable}")


def _disk_files(bed: Bed, pid: int) -> dict[str, int]:
    """Files of the snapshotter that a process has open, and how."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if (path := os.readlink(entry)).startswith(str(bed.ovms.state)):
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text(encoding="ascii")
            flags = next(int(line.split()[1], 8) for line in info.splitlines() if line.startswith("flags:"))
            found[path] = flags & os.O_ACCMODE
    return found


@case(guests=("native",))
def closed_input_loses_nothing(bed: Bed) -> None:
    """Input that is closed right behind its last byte reaches the guest whole, and the machine goes on without any."""
    image = bed.import_vm("talk")
    text = "".join(f"line {number} of the input\n" for number in range(200))

    with bed.vm_session(image, "vm", "--rm") as session:
        session.send(text + "q")
        session.close_input()
        said = session.wait()

    echoed = said.replace("\r\n", "\n")
    contains(echoed, text, "what came back")
    contains(echoed, "bye", "the guest's console")

    with bed.vm_session(image, "vm2", "--rm") as session:
        session.expect(bed.guests.ready("talk"))
        session.send("half")
        session.close_input()
        session.expect("half")
        bed.await_state("vm2", "RUNNING")
        time.sleep(bed.patience / 30)
        check(bed.containerd.tasks() == {"vm2": "RUNNING"}, f"without input: {bed.containerd.tasks()}")
        bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm2")
        session.wait(status=137)


@case(guests=("native",))
def a_terminal_is_resized(bed: Bed) -> None:
    """A client whose window changes its size is answered, and the conversation goes on."""
    image = bed.import_vm("talk")

    with bed.vm_session(image, "vm", "--rm", "-t") as session:
        session.expect(bed.guests.ready("talk"))
        for columns in (80, 132, 20):
            session.resize(columns, 25)
            session.send(f"width {columns}.")
            session.expect(rf"width {columns}\.")
        _talk(bed, session)
        said = session.wait()

    check("resize" not in said, f"the client complains: {said!r}")
    check("resize" not in bed.containerd.log, "containerd complains")


def _talk(bed: Bed, session: Session) -> None:
    said = len(session.text)
    if bed.guests.native:
        session.send("ping\n")
        session.expect("ping", after=said)
        session.send("q")
        session.expect("bye", after=said)
    else:
        session.send("echo $((6 * 7)) of them\n")
        session.expect("42 of them", after=said)
        session.send("exit\n")
        session.expect("powering off", after=said)


def _check_memory(bed: Bed, console: str, mib: int) -> None:
    pattern, unit = (r"ram (\d+)", 1) if bed.guests.native else (r"ovms-guest: memory (\d+) KiB", 1024)
    found = re.search(pattern, console)
    check(found, f"the guest did not say its memory: {console[-300:]!r}")
    assert found
    seen = int(found[1]) * unit / (1 << 20)
    # A kernel keeps some for itself; the bare-metal guest lacks the first MiB's holes only.
    check(mib - (2 if bed.guests.native else 80) <= seen <= mib, f"the guest has {seen:.0f} MiB, not {mib}")
