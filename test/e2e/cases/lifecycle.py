"""What is done to a machine while it runs: signals, pause, statistics, restarts of everything around it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

from e2e.harness import process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import CaseSkipped, case, check, contains
from e2e.harness.cgroups import memory_group
from e2e.harness.terminal import Session


@case()
def sigterm_presses_the_power_button(bed: Bed) -> None:
    """`ctr task kill` (SIGTERM) lets the guest power off by itself, with status 0."""
    console = bed.detached("wait")

    bed.containerd.ctr("task", "kill", "-s", "SIGTERM", "vm")

    bed.await_state("vm", "STOPPED")
    contains(console.read_text(encoding="utf-8"), "power button", "the guest's console")
    bed.containerd.delete_task("vm")


@case(guests=("native",))
def sigkill_ends_at_once_with_137(bed: Bed) -> None:
    """SIGKILL always works."""
    bed.detached("wait")

    bed.kill_and_delete()


@case(guests=("native",))
def a_running_task_is_not_deleted(bed: Bed) -> None:
    """`ctr task delete` of a running machine is refused, and it runs on."""
    bed.detached("wait")

    bed.refused(lambda: bed.containerd.ctr("task", "delete", "vm", status=None))

    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")


@case()
def pause_stops_the_vcpus(bed: Bed) -> None:
    """Between pause and resume the guest does not go on, and afterwards it does."""
    console = bed.detached("ticks")

    bed.containerd.ctr("task", "pause", "vm")
    check(bed.containerd.tasks() == {"vm": "PAUSED"}, f"tasks: {bed.containerd.tasks()}")
    time.sleep(0.5)
    still = console.stat().st_size
    time.sleep(bed.patience / 15)
    check(console.stat().st_size == still, "the guest went on while it was paused")
    bed.containerd.ctr("task", "resume", "vm")

    process.until("the guest goes on", lambda: console.stat().st_size > still, bed.patience)
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")


@case(guests=("native",))
def a_paused_machine_can_be_killed(bed: Bed) -> None:
    """SIGKILL ends a paused machine too."""
    bed.detached("wait")
    bed.containerd.ctr("task", "pause", "vm")

    bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm")

    bed.await_state("vm", "STOPPED")


@case()
def metrics_are_typed_for_the_hosts_cgroups(bed: Bed) -> None:
    """`ctr task metrics` understands the statistics and finds the guest's memory in them."""
    bed.detached("wait")

    text = bed.containerd.ctr("task", "metrics", "vm").out

    used = re.search(r"memory\.usage\S*\s+(\d+)", text)
    check(used and int(used[1]) > 0, f"no memory usage in {text!r}")
    check(re.search(r"cpu\S*usage\S*\s+[1-9]", text), f"no CPU usage in {text!r}")


@case()
def the_task_is_a_process_of_its_own(bed: Bed) -> None:
    """The task's process is the jailed VMM: unprivileged, without capabilities, in an empty root, under seccomp."""
    bed.detached("wait")

    pid = bed.containerd.task_pid("vm")
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")

    check(re.search(r"^Uid:\t(?!0\t)", status, re.MULTILINE), f"it runs as root: {status}")
    check(re.search(r"^CapEff:\t0+$", status, re.MULTILINE), f"it has capabilities: {status}")
    check(re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE), f"it may gain privileges: {status}")
    check(re.search(r"^Seccomp:\t2$", status, re.MULTILINE), f"it has no seccomp filter: {status}")
    check(not os.listdir(f"/proc/{pid}/root/"), f"its root holds {os.listdir(f'/proc/{pid}/root/')}")
    for namespace in ("mnt", "pid", "ipc", "uts", "net"):
        theirs, ours = os.readlink(f"/proc/{pid}/ns/{namespace}"), os.readlink(f"/proc/self/ns/{namespace}")
        check(theirs != ours, f"it shares the host's {namespace} namespace")


@case(guests=("native",))
def ps_shows_the_process(bed: Bed) -> None:
    """`ctr task ps` names the task's process."""
    bed.detached("wait")

    text = bed.containerd.ctr("task", "ps", "vm").out

    contains(text, str(bed.containerd.task_pid("vm")), "ctr task ps")


@case(guests=("native",))
def exec_says_that_there_is_no_agent(bed: Bed) -> None:
    """An image without an agent refuses exec in plain words and runs on."""
    bed.detached("wait")

    bed.refused(lambda: bed.containerd.ctr("task", "exec", "--exec-id", "e1", "vm", "/bin/true", status=None), "agent")
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")


@case(guests=("native",))
def events_come_in_order(bed: Bed) -> None:
    """containerd publishes create, start, exit and delete of a machine, in this order."""
    image = bed.import_vm("poweroff")

    with Session(bed.containerd.argv("events"), bed.ovms.env, tty=False, patience=bed.patience) as events:
        time.sleep(bed.patience / 30)
        bed.vm(image, "vm", "--rm")
        events.expect("/tasks/delete")

        topics = re.findall(r"/tasks/(create|start|exit|delete)", events.text)
    check(topics == ["create", "start", "exit", "delete"], f"the events were {topics}")


@case(guests=("native",))
def events_of_pauses_and_checkpoints(bed: Bed) -> None:
    """TaskPaused, TaskResumed and TaskCheckpointed are published in their order, those included that a checkpoint causes."""
    image = bed.import_vm("tally")

    with Session(bed.containerd.argv("events"), bed.ovms.env, tty=False, patience=bed.patience) as events:
        time.sleep(bed.patience / 30)
        console = tally.start(bed, image, "vm", *tally.SMALL)
        bed.containerd.ctr("task", "pause", "vm")
        bed.containerd.ctr("task", "resume", "vm")
        # containerd's client pauses a task around its checkpoint.
        bed.containerd.ctr("task", "checkpoint", "vm")
        tally.end(bed, "vm", console)
        events.expect("/tasks/delete")
        topics = re.findall(r"/tasks/(\w+) ", events.text)

    wanted = ["create", "start", "paused", "resumed", "paused", "checkpointed", "resumed", "exit", "delete"]
    check(topics == wanted, f"the events were {topics}")


@case()
def machines_survive_a_restart_of_containerd(bed: Bed) -> None:
    """After a restart of containerd the machine is listed, goes on, is killed and deleted as before."""
    console = bed.detached("ticks")
    pid = bed.containerd.task_pid("vm")

    bed.containerd.restart()

    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks after the restart: {bed.containerd.tasks()}")
    check(bed.containerd.task_pid("vm") == pid, "the task has another process now")
    size = console.stat().st_size
    process.until("the guest goes on", lambda: console.stat().st_size > size, bed.patience)
    bed.kill_and_delete()


@case(guests=("native",))
def attach_after_a_restart_of_containerd(bed: Bed) -> None:
    """`ctr task attach` reaches the guest's console, also when containerd was killed and started again meanwhile."""
    bed.vm(bed.import_vm("talk"), "vm", "-d")
    bed.containerd.kill()
    bed.containerd.restart()

    with Session(bed.containerd.argv("task", "attach", "vm"), bed.ovms.env, tty=False, patience=bed.patience * 2) as session:
        time.sleep(bed.patience / 15)
        if bed.guests.native:
            session.send("again\n")
            session.expect("again")
            session.send("q")
        else:
            session.send("echo $((40 + 2))\n")
            session.expect("42")
            session.send("exit\n")
        session.wait()


@case()
def a_dead_shim_takes_its_machine_along(bed: Bed) -> None:
    """When the shim is killed, the VMM dies with it, and containerd can clean up."""
    bed.detached("wait")
    vmm = bed.containerd.task_pid("vm")
    shims = [pid for pid, name in process.descendants().items() if "containerd-shim-ovms-v1" in name and "-id vm" in name]
    check(len(shims) == 1, f"shims: {shims}")

    os.kill(shims[0], signal.SIGKILL)

    process.until("the VMM is gone", lambda: not Path(f"/proc/{vmm}").exists(), bed.patience)
    process.until("containerd has noticed", lambda: bed.containerd.tasks().get("vm") != "RUNNING", bed.patience)
    bed.containerd.ctr("task", "delete", "--force", "vm", status=None)
    bed.containerd.ctr("containers", "delete", "vm")
    bed.nothing_half_made()


@case()
def image_removed_under_a_running_machine(bed: Bed) -> None:
    """`ctr images rm` and garbage collection do not touch a machine that runs, nor its next start."""
    image = bed.import_vm("wait")
    bed.detached("wait", image=image)

    bed.containerd.ctr("images", "rm", "--sync", image)
    check(not [name for name in bed.image_names() if not name.startswith("import-")], f"images are left: {bed.image_names()}")
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")
    bed.containerd.ctr("task", "kill", "-s", "SIGTERM", "vm")
    bed.await_state("vm", "STOPPED")
    bed.containerd.delete_task("vm")

    # The container is still there: it starts again from what our snapshotter kept.
    with Session(bed.containerd.argv("task", "start", "vm"), bed.ovms.env, tty=False, patience=bed.patience * 2) as session:
        session.expect(bed.guests.ready("wait"))
        bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm")
        session.wait(status=None)


@case(guests=("native",))
def writes_stay_in_the_machine_that_made_them(bed: Bed) -> None:
    """A machine finds its own writes again; another machine of the same image and the base files do not."""
    image = bed.import_vm("disk")
    before = bed.hashes()
    write = ("--annotation", "io.ovms.kernel-args=sector=0")

    first = bed.vm(image, "vm1", *write).out
    second = bed.vm(image, "vm2", *write).out
    bed.containerd.ctr("task", "delete", "vm1", status=None)
    again = bed.containerd.ctr("task", "start", "vm1", status=None).out

    contains(first, "sector 0: only the diff layer", "the first machine's console")
    contains(second, "sector 0: only the diff layer", "the second machine's console")
    check("disk good" in again and "only the diff layer" not in again, f"the first machine lost its write: {again!r}")
    bed.unchanged(before)


@case(guests=("stock",), seconds=120)
def two_machines_write_at_once(bed: Bed) -> None:
    """Two Debian machines of one image, running at once, see only their own writes, and the image stays as it was."""
    image = bed.import_vm("write")
    before = bed.hashes()
    for name in ("vm1", "vm2"):
        console = bed.dir / f"{name}.console"
        bed.vm(image, name, "-d", "--log-uri", f"file://{console}", "--memory-limit", str(256 << 20),
               "--annotation", f"io.ovms.kernel-args=ovms.token={name}")
    for name in ("vm1", "vm2"):
        bed.await_console(bed.dir / f"{name}.console", f"wrote {name}")
        contains((bed.dir / f"{name}.console").read_text(encoding="utf-8"), "found nothing", f"the console of {name}")
        bed.containerd.ctr("task", "kill", "-s", "SIGTERM", name)
        bed.await_state(name, "STOPPED")
        bed.containerd.delete_task(name)

    with Session(bed.containerd.argv("task", "start", "vm1"), bed.ovms.env, tty=False, patience=bed.patience * 2) as session:
        session.expect("found vm1")
        bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm1")
        session.wait(status=None)
    bed.unchanged(before)


@case(guests=("native",))
def twenty_machines_at_once(bed: Bed) -> None:
    """Twenty machines of one image run beside each other and all end when told to."""
    image = bed.import_vm("wait")
    names = [f"vm{number}" for number in range(20)]

    for name in names:
        bed.vm(image, name, "-d", "--null-io", "--annotation", "io.ovms.memory=32M")
    check(bed.containerd.tasks() == dict.fromkeys(names, "RUNNING"), f"tasks: {bed.containerd.tasks()}")
    for name in names:
        bed.containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    for name in names:
        bed.await_state(name, "STOPPED")
        bed.containerd.delete_task(name)
        bed.containerd.ctr("containers", "delete", name)

    bed.nothing_half_made()


@case(guests=("stock",))
def an_oom_kill_is_told(bed: Bed) -> None:
    """When the cgroup's limit kills the VMM, containerd hears TaskOOM before TaskExit 137."""
    bed.detached("fill")
    group = memory_group(bed.containerd.task_pid("vm"))
    if not (group / "memory.max").exists():
        raise CaseSkipped("cgroup v1 does not take a limit below what is in use")

    with Session(bed.containerd.argv("events"), bed.ovms.env, tty=False, patience=bed.patience * 2) as events:
        time.sleep(bed.patience / 30)
        # No limit of the container's own leads to this: the guest's memory always fits the group. The host's does.
        (group / "memory.max").write_text(str(48 << 20), encoding="ascii")
        events.expect("/tasks/exit")
        topics = re.findall(r"/tasks/(oom|exit)", events.text)
    check(topics[:2] == ["oom", "exit"], f"the events were {topics}")
    bed.await_state("vm", "STOPPED")
    bed.containerd.delete_task("vm", 137)


@case(guests=("native",))
def info_shows_what_containerd_stored(bed: Bed) -> None:
    """`ctr containers info` shows our runtime and snapshotter."""
    bed.detached("wait")

    info = json.loads(bed.containerd.ctr("containers", "info", "vm").out)

    check(info["Snapshotter"] == "ovms", f"the snapshotter is {info['Snapshotter']}")
    check(info["Runtime"]["Name"] == "io.containerd.ovms.v1", f"the runtime is {info['Runtime']}")
