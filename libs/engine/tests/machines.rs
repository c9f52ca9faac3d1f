//! The engine with the real VMM: lives, deaths, walls.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use common::{eventually, proc_status, unique, Host, PATIENCE};
use ovms_engine::{ExitReason, Kind, Limits, MachineEvent, State};

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_guest_that_powers_off_gives_its_output_status_0_and_leaves_nothing() {
    let host = Host::new();
    let (machine, console) = host.run("hello");
    let exit = machine.wait_timeout(PATIENCE).unwrap();
    assert_eq!((exit.status, &exit.reason), (0, &ExitReason::PowerOff));
    assert_eq!(console.rest(), "hello from the guest\n");
    let record = host.engine.load("engine-test", machine.id()).unwrap();
    assert_eq!((record.state, record.exit.as_ref()), (State::Stopped, Some(&exit)));
    let steps: Vec<_> = machine.timeline().into_iter().map(|(step, _)| step).collect();
    for step in ["files", "cgroup", "spawned", "limits", "vmm jail", "configured", "start", "vmm first exit"] {
        assert!(steps.iter().any(|known| known == step), "{step} is not in {steps:?}");
    }
    machine.delete().unwrap();
    host.assert_clean(machine.id(), machine.pid(), &record.cgroup);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_reservation_holds_its_name_and_leaves_nothing_unused() {
    let host = Host::new();
    let (mut spec, _console) = host.spec("hello");
    let reservation = host.engine.reserve(&spec).unwrap();
    let record = host.engine.load("engine-test", &spec.id).unwrap();
    assert!(!record.cgroup.is_empty() && record.cgroup.iter().all(|dir| dir.exists()));
    assert_eq!(host.engine.reserve(&spec).unwrap_err().kind(), Kind::AlreadyExists);

    let id = std::mem::replace(&mut spec.id, unique("other"));
    let err = host.engine.create_in(reservation, spec).unwrap_err();

    assert!(err.to_string().contains("another machine's"), "{err}");
    // A cgroup that holds a VMM cannot be removed.
    assert!(record.cgroup.iter().all(|dir| !dir.exists()));
    assert!(host.engine.load("engine-test", &id).is_err());
    assert_eq!(fs::read_dir(host.settings.paths.runtime.join("machines/engine-test")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn every_end_has_its_status() {
    let host = Host::new();
    for (guest, status) in [("reboot", 0), ("panic", 134), ("triple", 139)] {
        let (machine, _console) = host.run(guest);
        assert_eq!(machine.wait_timeout(PATIENCE).unwrap().status, status, "{guest}");
        machine.delete().unwrap();
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_running_guest_pauses_resumes_and_stops_by_its_power_button() {
    let host = Host::new();
    let (machine, mut console) = host.run("spin");
    console.expect("tick 2\n");
    machine.pause().unwrap();
    assert_eq!(machine.status().state, State::Paused);
    assert_eq!(machine.vmm_status().unwrap().exits, machine.vmm_status().unwrap().exits);
    machine.resume().unwrap();
    let exits = machine.vmm_status().unwrap().exits;
    eventually("the guest goes on", || machine.vmm_status().unwrap().exits > exits);
    machine.power_button().unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE).unwrap().reason, ExitReason::PowerOff);
    assert!(console.rest().ends_with("power button\n"));
    machine.delete().unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn kill_and_kill_9_of_the_vmm_end_with_137_and_leave_nothing() {
    let host = Host::new();
    for from_outside in [false, true] {
        let (machine, mut console) = host.run("spin");
        console.expect("tick 1\n");
        let record = host.engine.load("engine-test", machine.id()).unwrap();
        if from_outside {
            assert!(Command::new("kill").args(["-9", &machine.pid().to_string()]).status().unwrap().success());
        } else {
            machine.kill().unwrap();
        }
        let exit = machine.wait_timeout(PATIENCE).unwrap();
        assert_eq!((exit.status, exit.reason, exit.oom_killed), (137, ExitReason::Killed, false));
        machine.delete().unwrap();
        host.assert_clean(machine.id(), machine.pid(), &record.cgroup);
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn the_jail_stands() {
    let host = Host::new();
    let (machine, mut console) = host.run("spin");
    console.expect("tick 0\n");
    let pid = machine.pid();
    let uid = host.engine.load("engine-test", machine.id()).unwrap().uid.unwrap();
    assert_eq!(proc_status(pid, "Uid"), [uid; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(proc_status(pid, "Gid"), [uid; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(proc_status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(proc_status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(proc_status(pid, "NoNewPrivs"), "1");
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n"), "a thread has no filter: {status}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count(), 1);
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    // Not dumpable: its files in /proc are root's, not its user's.
    assert_eq!(fs::metadata(format!("/proc/{pid}/mem")).unwrap().uid(), 0);
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_ascii_whitespace().nth(4), Some("0"));
    let sockets: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| target.starts_with("/") && !target.starts_with(host.dir.path()))
        .filter(|target| !["/dev/null", "/dev/kvm", "/dev/userfaultfd"].contains(&target.to_str().unwrap()))
        // Which of its own pages were written, for snapshots.
        .filter(|target| target != &PathBuf::from(format!("/proc/{pid}/pagemap")))
        .collect();
    assert!(sockets.is_empty(), "stray files in the jail: {sockets:?}");
    machine.kill().unwrap();
    machine.wait();
    machine.delete().unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_machine_joins_the_network_namespace_of_its_spec() {
    let host = Host::new();
    let name = unique("ovms-test");
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let (mut spec, _console) = host.spec("spin");
    let path = PathBuf::from(format!("/run/netns/{name}"));
    spec.netns = Some(path.clone());
    let created = host.engine.create(spec);
    let inode = fs::metadata(&path).unwrap().ino();
    let joined = created.as_ref().map(|machine| fs::metadata(format!("/proc/{}/ns/net", machine.pid())).unwrap().ino());
    let joined = joined.map_err(|err| err.chain());
    let deleted = created.map(|machine| machine.delete().unwrap().status).map_err(|err| err.chain());
    assert!(Command::new("ip").args(["netns", "del", &name]).status().unwrap().success());
    assert_eq!((joined, deleted), (Ok(inode), Ok(137)));
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn limits_stand_in_the_cgroup_before_the_guest_runs_and_change_by_update() {
    let host = Host::new();
    let (mut spec, _console) = host.spec("spin");
    spec.cgroups_path = Some(format!("/ovms-test-{}", spec.id));
    spec.limits =
        Limits { cpu_shares: Some(512), cpu_quota: Some(50_000), cpu_period: Some(100_000), ..Limits::default() };
    let machine = host.engine.create(spec).unwrap();
    let record = host.engine.load("engine-test", machine.id()).unwrap();
    for dir in &record.cgroup {
        let inside = fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), machine.pid().to_string(), "{}", dir.display());
    }
    let stats = machine.stats().unwrap();
    assert_eq!(stats.memory.limit, (64 << 20) + host.settings.vm.overhead);
    let read = |v1: &str, v2: &str| {
        record
            .cgroup
            .iter()
            .find_map(|dir| fs::read_to_string(dir.join(v1)).or_else(|_| fs::read_to_string(dir.join(v2))).ok())
    };
    assert!(["512\n", "20\n"].contains(&read("cpu.shares", "cpu.weight").unwrap().as_str()));
    assert!(["50000\n", "50000 100000\n"].contains(&read("cpu.cfs_quota_us", "cpu.max").unwrap().as_str()));
    machine.start().unwrap();
    machine.update(&Limits { cpu_shares: Some(256), memory: Some(96 << 20), ..Limits::default() }).unwrap();
    assert_eq!(machine.stats().unwrap().memory.limit, (96 << 20) + host.settings.vm.overhead);
    eventually("processor time is counted", || machine.stats().unwrap().cpu.usage_ns > 0);
    assert!(machine.stats().unwrap().memory.usage > 0);
    assert!(machine.stats().unwrap().pids.current >= 2);
    machine.kill().unwrap();
    machine.wait();
    machine.delete().unwrap();
    host.assert_clean(machine.id(), machine.pid(), &record.cgroup);
}

/// What the first of the files says that is in one of the cgroup's directories.
fn cgroup_file(dirs: &[PathBuf], files: [&str; 2]) -> String {
    let all = dirs.iter().flat_map(|dir| files.map(|file| dir.join(file)));
    all.filter_map(|path| fs::read_to_string(path).ok()).next().map_or_else(String::new, |text| text.trim().to_owned())
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn cpus_nodes_reservation_and_oom_score_land_where_the_kernel_reads_them() {
    let host = Host::new();
    let (mut spec, _console) = host.spec("spin");
    spec.oom_score_adj = Some(321);
    spec.limits = Limits {
        cpuset_cpus: Some("0".into()),
        cpuset_mems: Some("0".into()),
        memory_reservation: Some(48 << 20),
        ..Limits::default()
    };
    let machine = host.engine.create(spec).unwrap();
    let record = host.engine.load("engine-test", machine.id()).unwrap();
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", machine.pid())).unwrap();
    assert_eq!(score.trim(), "321", "the test's own is {own}");
    assert_eq!(cgroup_file(&record.cgroup, ["cpuset.cpus"; 2]), "0");
    assert_eq!(cgroup_file(&record.cgroup, ["cpuset.mems"; 2]), "0");
    let reservation = cgroup_file(&record.cgroup, ["memory.soft_limit_in_bytes", "memory.low"]);
    assert_eq!(reservation, (48 << 20).to_string());
    // The kernel has heard of it: that is where the VMM's threads may run.
    assert_eq!(proc_status(machine.pid(), "Cpus_allowed_list"), "0");
    assert_eq!(proc_status(machine.pid(), "Mems_allowed_list"), "0");
    machine.start().unwrap();
    machine.update(&Limits { memory_reservation: Some(40 << 20), ..Limits::default() }).unwrap();
    let reservation = cgroup_file(&record.cgroup, ["memory.soft_limit_in_bytes", "memory.low"]);
    assert_eq!(reservation, (40 << 20).to_string());
    machine.kill().unwrap();
    machine.wait();
    machine.delete().unwrap();
    host.assert_clean(machine.id(), machine.pid(), &record.cgroup);
}

/// Removes the slices that a test has made, innermost first.
struct Slices(Vec<PathBuf>);

impl Drop for Slices {
    fn drop(&mut self) {
        for dir in &self.0 {
            let _ = fs::remove_dir(dir);
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn systemds_form_of_a_cgroup_is_a_scope_below_its_nested_slices() {
    let host = Host::new();
    let (mut spec, _console) = host.spec("spin");
    let (id, stem) = (spec.id.clone(), format!("ovmstest{}", std::process::id()));
    spec.cgroups_path = Some(format!("{stem}-pod.slice:ovms:{id}"));
    let place = PathBuf::from(format!("{stem}.slice/{stem}-pod.slice/ovms-{id}.scope"));
    let machine = host.engine.create(spec).unwrap();
    let record = host.engine.load("engine-test", &id).unwrap();
    let _slices =
        Slices(record.cgroup.iter().flat_map(|dir| dir.ancestors().skip(1).take(2)).map(Into::into).collect());
    assert!(!record.cgroup.is_empty());
    for dir in &record.cgroup {
        assert!(dir.ends_with(&place), "{}", dir.display());
        let inside = fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), machine.pid().to_string(), "{}", dir.display());
    }
    assert_eq!(machine.stats().unwrap().memory.limit, (64 << 20) + host.settings.vm.overhead);
    let told = fs::read_to_string(format!("/proc/{}/cgroup", machine.pid())).unwrap();
    assert!(told.contains(place.to_str().unwrap()), "{told}");
    machine.delete().unwrap();
    host.assert_clean(&id, machine.pid(), &record.cgroup);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_machine_that_uses_too_much_memory_tells_oom_before_its_exit() {
    let host = Host::new();
    let (spec, mut console) = host.spec("eat");
    let machine = host.engine.create(spec).unwrap_or_else(|err| panic!("{}", err.chain()));
    let record = host.engine.load("engine-test", machine.id()).unwrap();
    let files = ["memory.limit_in_bytes", "memory.max"];
    let limit = record.cgroup.iter().flat_map(|dir| files.map(|file| dir.join(file))).find(|path| path.exists());
    fs::write(limit.unwrap(), (24 << 20).to_string()).unwrap();
    let (tell, events) = mpsc::channel();
    machine.subscribe(move |event| tell.send(event.clone()).unwrap());
    machine.start().unwrap();
    console.expect("eating\n");
    let exit = machine.wait_timeout(PATIENCE).unwrap();
    assert_eq!((exit.status, exit.oom_killed), (137, true), "{exit:?}");
    let order: Vec<_> = events.try_iter().filter(|event| !matches!(event, MachineEvent::FirstExit { .. })).collect();
    assert_eq!(order[0], MachineEvent::Started);
    assert_eq!(order[1], MachineEvent::Oom);
    assert_eq!(order.last(), Some(&MachineEvent::Exited(exit)));
    machine.delete().unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn create_on_disk_in_use_returns_failed_precondition_with_the_holder() {
    let host = Host::new();
    let (spec, _console) = host.spec("spin");
    let bundle = spec.bundle.clone();
    let first = host.engine.create(spec).unwrap();
    let (mut spec, _console) = host.spec("spin");
    spec.bundle = bundle.clone();
    let err = host.engine.create(spec).unwrap_err();
    assert_eq!(err.kind(), Kind::FailedPrecondition);
    assert!(err.chain().contains("in use by machine engine-test/"), "{}", err.chain());
    assert!(err.chain().contains(first.id()), "{}", err.chain());
    first.delete().unwrap();
    let (mut spec, _console) = host.spec("spin");
    spec.bundle = bundle;
    host.engine.create(spec).expect("the disk is free again").delete().unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn two_machines_have_two_users_and_one_name_is_one_machine() {
    let host = Host::new();
    let (spec, _first_console) = host.spec("spin");
    let id = spec.id.clone();
    let first = host.engine.create(spec).unwrap();
    let (second, _second_console) = host.run("spin");
    assert_ne!(proc_status(first.pid(), "Uid"), proc_status(second.pid(), "Uid"));
    let (mut spec, _console) = host.spec("spin");
    spec.id = id;
    assert_eq!(host.engine.create(spec).unwrap_err().kind(), Kind::AlreadyExists);
    for machine in [first, second] {
        machine.kill().unwrap();
        machine.wait();
        machine.delete().unwrap();
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn many_machines_at_once_live_and_leave_side_by_side() {
    let host = Host::new();
    let lives: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..20)
            .map(|_| {
                scope.spawn(|| {
                    let (machine, console) = host.run("hello");
                    let uid = host.engine.load("engine-test", machine.id()).unwrap().uid.unwrap();
                    let exit = machine.wait_timeout(PATIENCE).unwrap();
                    assert_eq!((exit.status, console.rest().as_str()), (0, "hello from the guest\n"));
                    (machine, uid)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut uids: Vec<_> = lives.iter().map(|(_, uid)| *uid).collect();
    uids.sort_unstable();
    uids.dedup();
    assert_eq!(uids.len(), 20);
    for (machine, _) in lives {
        let record = host.engine.load("engine-test", machine.id()).unwrap();
        machine.delete().unwrap();
        for dir in &record.cgroup {
            assert!(!dir.exists(), "{} is left", dir.display());
        }
    }
    assert_eq!(fs::read_dir(host.settings.paths.runtime.join("uids")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn what_cannot_be_built_says_why_and_leaves_nothing() {
    let host = Host::new();
    let (mut spec, _console) = host.spec("hello");
    spec.extra_kernel_args = Some("x".repeat(3000));
    assert_eq!(host.engine.create(spec).unwrap_err().kind(), Kind::InvalidArgument);
    let (spec, _console) = host.spec("hello");
    let record = fs::read_to_string(&spec.bundle).unwrap();
    let kernel = host.dir.path().join("no-kernel");
    fs::write(&kernel, "this is no kernel").unwrap();
    let guest = common::root().join("target/guests/hello.elf");
    fs::write(&spec.bundle, record.replace(guest.to_str().unwrap(), kernel.to_str().unwrap())).unwrap();
    let err = host.engine.create(spec).unwrap_err();
    assert_eq!(err.kind(), Kind::InvalidArgument);
    assert!(err.chain().starts_with("the VMM cannot build the machine: "), "{}", err.chain());
    assert!(err.chain().contains("kernel"), "{}", err.chain());
    assert!(host.engine.list().is_empty());
    let machines = host.settings.paths.runtime.join("machines/engine-test");
    assert_eq!(fs::read_dir(machines).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.settings.paths.runtime.join("uids")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_program_that_is_no_vmm_is_told_apart_from_one_that_cannot_be_executed() {
    let host = Host::with(|settings| settings.paths.vmm = "/bin/true".into());
    let (spec, _console) = host.spec("hello");
    let err = host.engine.create(spec).unwrap_err();
    assert!(err.chain().contains("ended with status 0 without saying why"), "{}", err.chain());
    let script = host.dir.path().join("vmm");
    fs::write(&script, "no program").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let broken = Host::with(|settings| settings.paths.vmm = script);
    let (spec, _console) = broken.spec("hello");
    let err = broken.engine.create(spec).unwrap_err();
    assert!(err.chain().contains("cannot be executed: Exec format error"), "{}", err.chain());
}

/// Not a test of its own: the engine that `a_machine_dies_with_its_engine` kills.
#[test]
#[ignore = "needs /dev/kvm and root"]
fn engine_to_be_killed() {
    let Some(runtime) = std::env::var_os("ENGINE_TEST_RUNTIME") else { return };
    let host = Host::with(|settings| settings.paths.runtime = runtime.into());
    let (machine, mut console) = host.run("spin");
    console.expect("tick 0\n");
    fs::write(host.settings.paths.runtime.join("started"), machine.id()).unwrap();
    machine.wait();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_machine_dies_with_its_engine_and_cleanup_removes_the_rest_from_its_record() {
    let host = Host::new();
    let runtime = &host.settings.paths.runtime;
    let mut engine = Command::new(std::env::current_exe().unwrap())
        .args(["engine_to_be_killed", "--exact", "--ignored", "--nocapture"])
        .env("ENGINE_TEST_RUNTIME", runtime)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the machine runs", || runtime.join("started").exists());
    // The name is written in two steps.
    eventually("its name is there", || !fs::read(runtime.join("started")).unwrap().is_empty());
    let id = fs::read_to_string(runtime.join("started")).unwrap();
    let record = host.engine.load("engine-test", &id).unwrap();
    let pid = record.process.unwrap().pid;
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    engine.kill().unwrap();
    engine.wait().unwrap();
    eventually("the VMM leaves", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    let exit = host.engine.cleanup("engine-test", &id, None).unwrap().unwrap();
    assert_eq!(exit.status, 137);
    assert_eq!(host.engine.cleanup("engine-test", &id, None).unwrap(), None);
    for dir in &record.cgroup {
        assert!(!dir.exists(), "{} is left", dir.display());
    }
    assert!(!runtime.join("uids").join(record.uid.unwrap().to_string()).exists());
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn cleanup_kills_a_machine_that_still_runs() {
    let host = Host::new();
    let (machine, mut console) = host.run("spin");
    console.expect("tick 0\n");
    let exit = host.engine.cleanup("engine-test", machine.id(), None).unwrap().unwrap();
    assert_eq!(exit.status, 137);
    assert_eq!(machine.wait_timeout(Duration::from_secs(5)).unwrap().reason, ExitReason::Killed);
    machine.delete().unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn cleanup_for_an_earlier_machine_of_the_name_leaves_the_next_one_alone() {
    let host = Host::new();
    let instance = |id: &str, instance: &str| {
        let (mut spec, console) = host.spec("spin");
        (spec.id, spec.instance) = (id.to_owned(), Some(instance.to_owned()));
        (host.engine.create(spec).unwrap(), console)
    };
    let id = common::unique("vm");
    let (first, _console) = instance(&id, "first");
    first.delete().unwrap();
    let (second, mut console) = instance(&id, "second");
    second.start().unwrap();
    for earlier in [Some("first"), None] {
        assert_eq!(host.engine.cleanup("engine-test", &id, earlier).unwrap(), None);
    }
    assert_eq!(second.status().state, State::Running);
    let record = host.engine.load("engine-test", &id).unwrap();
    assert!(record.cgroup.iter().all(|dir| dir.exists()));
    console.expect("tick 1\n");
    let exit = host.engine.cleanup("engine-test", &id, Some("second")).unwrap().unwrap();
    assert_eq!((exit.status, second.wait().reason), (137, ExitReason::Killed));
    second.delete().unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn console_has_the_size_that_was_set_before_the_start() {
    let host = Host::new();
    let (spec, _console) = host.spec("spin");
    let machine = host.engine.create(spec).unwrap();
    machine.resize_console(132, 43).unwrap();
    assert_eq!(machine.status().state, State::Created);
    machine.start().unwrap();
    machine.resize_console(80, 25).unwrap();
    machine.kill().unwrap();
    machine.wait();
    machine.delete().unwrap();
}
