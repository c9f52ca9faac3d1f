//! RAM snapshots with the real VMM: taken, given up, resumed, chained.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{eventually, proc_status, unique, Console, Host, PATIENCE};
use ovms_bundle::{create_top, Bundle, Ram, Record, SnapshotRecord, TopPaths, SNAPSHOT_DISK, SNAPSHOT_RAM};
use ovms_config::settings::RamPolicy;
use ovms_engine::{
    BootChoice, CreateSpec, ExitReason, Kind, Machine, MachineEvent, OnIncompatible, SnapshotOptions, State, ToMachine,
};
use ovms_state::{unpack, Blob, Limits, StateFile};

const FULL: SnapshotOptions = SnapshotOptions { full: true, stop: false };
const DIFF: SnapshotOptions = SnapshotOptions { full: false, stop: false };

/// The machine `tally` at work: it counts in memory and on disk.
fn tally(host: &Host, arguments: &str) -> (Machine, Console, PathBuf) {
    let (mut spec, mut console) = host.spec("tally");
    spec.extra_kernel_args = Some(arguments.into());
    let bundle = spec.bundle.clone();
    let machine = host.engine.create(spec).unwrap_or_else(|err| panic!("{}", err.chain()));
    machine.start().unwrap();
    console.expect("count 3\n");
    (machine, console, bundle)
}

fn empty_dir(host: &Host) -> PathBuf {
    let dir = host.dir.path().join(unique("snapshot"));
    fs::create_dir(&dir).unwrap();
    dir
}

fn take(machine: &Machine, dir: &Path, options: SnapshotOptions) -> SnapshotRecord {
    machine.snapshot(dir, options, &mut |_| (), &|| false).unwrap_or_else(|err| panic!("{}", err.chain()))
}

/// A bundle that goes on from the snapshots in `dirs`, newest first, with a disk as the newest froze it.
fn resumed(host: &Host, original: &Path, dirs: &[&Path]) -> PathBuf {
    let dir = host.dir.path().join(unique("resumed"));
    fs::create_dir(&dir).unwrap();
    let path = |name: &str| dir.join(name);
    let create = |name: &str| File::options().read(true).write(true).create_new(true).open(path(name)).unwrap();
    let records: Vec<_> = dirs.iter().map(|dir| SnapshotRecord::load(dir).unwrap()).collect();
    let names: Vec<_> = records.iter().map(|record| record.ram.digest.clone()).collect();
    let blobs = dirs.iter().map(|dir| Blob::open(File::open(dir.join(SNAPSHOT_RAM)).unwrap()).unwrap()).collect();
    let limits = Limits { memory: 1 << 30 };
    unpack(blobs, &names, (&create("memory"), &create("state")), 2, limits, &mut |_, _| true).unwrap();

    let mut record = Record::load(original).unwrap();
    let disk = record.disk.as_mut().unwrap();
    let top = TopPaths { data: path("top.data"), map: path("top.map") };
    create_top(&top, disk.virtual_size).unwrap();
    disk.top = Some(top);
    record.ram = Some(Ram {
        digest: names[0].clone(),
        parents: names[1..].to_vec(),
        state: path("state"),
        memory: path("memory"),
        working_set: path("working-set"),
        mlock: false,
    });
    record.save(&path("bundle.json")).unwrap();
    path("bundle.json")
}

/// A machine's snapshot as the bundle of a clone; the machine itself is gone.
fn bundle_of_a_clone(host: &Host, arguments: &str) -> PathBuf {
    let (machine, _console, bundle) = tally(host, arguments);
    let dir = empty_dir(host);
    take(&machine, &dir, DIFF);
    let clone_bundle = resumed(host, &bundle, &[&dir]);
    kill(&machine);
    clone_bundle
}

/// What a caller asks for to go on from this bundle. Nothing is said of sizes.
fn go_on(host: &Host, bundle: &Path) -> (CreateSpec, Console) {
    let (mut spec, console) = host.spec("tally");
    spec.bundle = bundle.into();
    spec.wishes = Default::default();
    (spec, console)
}

fn create(host: &Host, spec: CreateSpec) -> Machine {
    host.engine.create(spec).unwrap_or_else(|err| panic!("{}", err.chain()))
}

/// Presses the power button and has the guest look through its memory and its disk.
fn assert_good(machine: &Machine, console: Console) -> u64 {
    machine.power_button().unwrap();
    let exit = machine.wait_timeout(PATIENCE).expect("the guest powers off");
    let said = console.rest();
    assert_eq!(exit.reason, ExitReason::PowerOff, "{said}");
    let last = said.lines().last().unwrap();
    let count = last.strip_prefix("all good at ").unwrap_or_else(|| panic!("{said}"));
    machine.delete().unwrap();
    count.parse().unwrap()
}

fn kill(machine: &Machine) {
    machine.kill().unwrap();
    machine.wait_timeout(PATIENCE).unwrap();
    machine.delete().unwrap();
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_snapshot_goes_on_twice_and_its_machine_too() {
    let host = Host::new();
    let (machine, console, bundle) = tally(&host, "fill=8 dirty=64");
    let dir = empty_dir(&host);
    let record = take(&machine, &dir, DIFF);
    assert_eq!(machine.status().state, State::Running);
    assert_eq!((record.ram.vcpus, record.ram.memory, record.ram.parents.len()), (1, 64 << 20, 0));
    assert_eq!(record.ram.size, fs::metadata(dir.join(SNAPSHOT_RAM)).unwrap().len());
    assert_eq!(record.disk.unwrap().size, fs::metadata(dir.join(SNAPSHOT_DISK)).unwrap().len());
    assert_eq!(files(&dir), 3);

    // As the record is at the snapshot: the machine adds to it when it is snapshotted again.
    let clones = [resumed(&host, &bundle, &[&dir]), resumed(&host, &bundle, &[&dir])];
    let mut counts = Vec::new();
    for clone in &clones {
        let (spec, mut console) = go_on(&host, clone);
        let clone = create(&host, spec);
        let steps = clone.timeline();
        clone.start().unwrap();
        console.expect("count ");
        assert!(steps.iter().any(|(step, _)| step.starts_with("vmm ")), "{steps:?}");
        counts.push(assert_good(&clone, console));
    }
    assert!(counts.iter().all(|count| *count >= 3), "{counts:?}");
    assert!(assert_good(&machine, console) >= 3);
    assert_eq!(fs::read_dir(host.settings.paths.runtime.join("machines/engine-test")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_paused_machine_is_snapshotted_and_stays_paused_and_a_stopping_snapshot_pauses() {
    let host = Host::new();
    let (machine, console, _) = tally(&host, "fill=2");
    machine.pause().unwrap();
    take(&machine, &empty_dir(&host), DIFF);
    assert_eq!(machine.status().state, State::Paused);
    machine.resume().unwrap();
    take(&machine, &empty_dir(&host), SnapshotOptions { full: false, stop: true });
    assert_eq!(machine.status().state, State::Paused);
    let exits = machine.vmm_status().unwrap().exits;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.vmm_status().unwrap().exits, exits);
    machine.resume().unwrap();
    assert_good(&machine, console);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_clone_of_a_clone_stores_what_changed_and_goes_on_from_the_chain() {
    let host = Host::new();
    let (machine, _console, bundle) = tally(&host, "fill=32 dirty=8");
    let first = empty_dir(&host);
    let whole = take(&machine, &first, DIFF);
    let clone_bundle = resumed(&host, &bundle, &[&first]);
    kill(&machine);

    let (spec, mut console) = go_on(&host, &clone_bundle);
    let clone = create(&host, spec);
    clone.start().unwrap();
    console.expect("count ");
    let second = empty_dir(&host);
    let diff = take(&clone, &second, DIFF);
    assert_eq!(diff.ram.parents, std::slice::from_ref(&whole.ram.digest));
    assert!(diff.ram.size < whole.ram.size / 2, "{} of {}", diff.ram.size, whole.ram.size);
    // With the disk as it is now: the next snapshot freezes another top.
    let chained = resumed(&host, &clone_bundle, &[&second, &first]);
    let full = empty_dir(&host);
    assert_eq!(take(&clone, &full, FULL).ram.parents, [""; 0]);
    assert_good(&clone, console);

    let (spec, mut console) = go_on(&host, &chained);
    let grandchild = create(&host, spec);
    grandchild.start().unwrap();
    console.expect("count ");
    let third = empty_dir(&host);
    assert_eq!(take(&grandchild, &third, DIFF).ram.parents, [diff.ram.digest, whole.ram.digest]);
    assert_good(&grandchild, console);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn cancelled_and_disk_full_leave_the_machine_running_and_nothing_behind() {
    let host = Host::new();
    let (machine, console, bundle) = tally(&host, "fill=32 dirty=512");
    let before = fs::read(&bundle).unwrap();

    let dir = empty_dir(&host);
    let err = machine.snapshot(&dir, DIFF, &mut |_| (), &|| true).unwrap_err();
    assert!(err.chain().contains("cancelled"), "{}", err.chain());
    assert_eq!(files(&dir), 0);
    // A cancel may come after the instant; then the top stays frozen.
    let frozen = Record::load(&bundle).unwrap().disk.unwrap().frozen.len();
    assert!(frozen == 1 || fs::read(&bundle).unwrap() == before);

    let small = empty_dir(&host);
    let mount = |arguments: &[&str]| Command::new(arguments[0]).args(&arguments[1..]).status().unwrap().success();
    assert!(mount(&["mount", "-t", "tmpfs", "-o", "size=64k", "none", small.to_str().unwrap()]));
    let err = machine.snapshot(&small, DIFF, &mut |_| (), &|| false).map(drop);
    let left = files(&small);
    assert!(mount(&["umount", small.to_str().unwrap()]));
    let err = err.unwrap_err();
    assert!(err.chain().contains("No space left"), "{}", err.chain());
    assert_eq!(left, 0);

    let dir = empty_dir(&host);
    take(&machine, &dir, DIFF);
    assert_good(&machine, console);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_frozen_disk_is_read_while_its_machine_writes_on() {
    let host = Host::new();
    let (machine, mut console, bundle) = tally(&host, "fill=1");
    let socket = host.engine.remote("engine-test", machine.id()).unwrap();
    socket.request(&ToMachine::FreezeDisk, &mut |_| ()).unwrap();
    let mut record = Record::load(&bundle).unwrap();
    let disk = record.disk.as_mut().unwrap();
    assert_eq!(disk.frozen.len(), 1);
    let read = || {
        let mut data = vec![0; 1 << 20];
        let length = File::open(&disk.frozen[0].data).unwrap().read_at(&mut data, 0).unwrap();
        data.truncate(length);
        data
    };
    let frozen = read();
    assert!(frozen[4096..8192].iter().any(|byte| *byte != 0), "the count lies in sector 8");
    let count = u64::from_le_bytes(frozen[4096..4104].try_into().unwrap());
    console.expect(&format!("count {}\n", count + 2));
    assert!(read() == frozen);
    let err = Bundle::open(&bundle, "another", false).unwrap_err().to_string();
    assert!(err.contains("in use by machine engine-test/"), "{err}");
    for _ in 0..3 {
        machine.freeze_disk().unwrap();
    }
    assert_good(&machine, console);
    // The chain is what the next machine of this bundle runs on.
    let stack = Bundle::open(&bundle, "a test", false).unwrap().disk.unwrap().into_stack().unwrap();
    let mut count = [0; 512];
    stack.read_at(4096, &mut count).unwrap();
    assert_ne!(count, frozen[4096..4608], "the count in the first top is the last");
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn the_working_set_is_recorded_by_the_first_and_used_by_the_next() {
    let host = Host::new();
    let clone_bundle = bundle_of_a_clone(&host, "fill=8");
    let path = clone_bundle.with_file_name("working-set");
    let begin = |host: &Host| {
        let (spec, console) = go_on(host, &clone_bundle);
        (create(host, spec), console)
    };
    let end = |(clone, mut console): (Machine, Console)| {
        clone.start().unwrap();
        console.expect("count ");
        eventually("the working set is recorded", || path.exists());
        kill(&clone);
    };
    let first = begin(&host);
    // Before its guest runs: what building the machine touches.
    let touched = mapped(first.0.pid());
    end(first);
    let set = ovms_state::WorkingSet::read(&File::open(&path).unwrap(), 64 << 20).unwrap();
    assert!(set.pages() << 12 > 4 * touched, "{} pages, {touched} bytes", set.pages());

    let next = begin(&host);
    eventually("the working set is mapped before the guest runs", || mapped(next.0.pid()) >= set.pages() << 12);
    end(next);
}

/// Bytes of the memory file that are mapped into a VMM.
fn mapped(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut of_file, mut kib) = (false, 0);
    for line in maps.lines() {
        match line.split_once(':') {
            Some(("Rss", size)) if of_file => kib += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap(),
            Some((field, _)) if !field.contains(' ') => {}
            _ => of_file = line.ends_with("/memory"),
        }
    }
    kib << 10
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn ram_that_must_be_locked_is_locked_by_the_engine_and_by_the_vmm_and_free_afterwards() {
    let host = Host::new();
    let clone_bundle = bundle_of_a_clone(&host, "fill=8");
    let mut record = Record::load(&clone_bundle).unwrap();
    record.ram.as_mut().unwrap().mlock = true;
    record.save(&clone_bundle).unwrap();
    let locked = |pid| proc_status(pid, "VmLck").trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
    let own = std::process::id();
    let before = locked(own);
    let (mut spec, mut console) = go_on(&host, &clone_bundle);
    spec.lock_ram = true;
    let clone = create(&host, spec);
    clone.start().unwrap();
    console.expect("count ");
    assert_eq!(locked(own), before + (64 << 20));
    assert!(locked(clone.pid()) >= 8 << 20, "{}", locked(clone.pid()));
    assert_good(&clone, console);
    drop(clone);
    eventually("the RAM file is let go", || locked(own) == before);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn policy_sizes_and_cold_boots_are_as_the_caller_asks() {
    let host = Host::new();
    let clone_bundle = bundle_of_a_clone(&host, "fill=1");

    let strict = Host::with(|settings| settings.ram.policy = RamPolicy::Signed);
    let err = strict.engine.create(go_on(&host, &clone_bundle).0).unwrap_err();
    assert!(err.chain().contains("policy = \"signed\""), "{}", err.chain());
    assert!(!strict.settings.paths.runtime.join("machines/engine-test").exists() || strict.engine.list().is_empty());

    let (mut spec, _) = go_on(&host, &clone_bundle);
    spec.wishes.spec_memory = Some(62 << 20);
    let err = host.engine.create(spec).unwrap_err();
    assert_eq!(err.kind(), Kind::FailedPrecondition);
    assert!(err.chain().contains("the machine in the RAM snapshot has 67108864"), "{}", err.chain());

    let (mut spec, mut console) = go_on(&host, &clone_bundle);
    spec.boot = BootChoice::Cold;
    spec.wishes.spec_memory = Some(96 << 20);
    let cold = create(&host, spec);
    cold.start().unwrap();
    console.expect("tally\n");
    kill(&cold);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn an_incompatible_host_refuses_by_name_and_boots_if_it_may() {
    let host = Host::new();
    let clone_bundle = bundle_of_a_clone(&host, "fill=1");
    // As if it had been taken where KVM can more.
    let state = clone_bundle.with_file_name("state");
    let (mut head, sections) = StateFile::read(&File::open(&state).unwrap()).unwrap();
    head.fingerprint.capabilities.push("time-travel".into());
    fs::remove_file(&state).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(&state).unwrap();
    StateFile::write(&file, &head, &sections).unwrap();

    let err = host.engine.create(go_on(&host, &clone_bundle).0).unwrap_err();
    assert!(err.is_incompatible() && err.chain().contains("time-travel"), "{}", err.chain());
    let (mut spec, mut console) = go_on(&host, &clone_bundle);
    spec.on_incompatible = OnIncompatible::Boot;
    spec.wishes.spec_memory = Some(64 << 20);
    let cold = create(&host, spec);
    assert!(cold.timeline().iter().any(|(step, _)| step == "cold boot instead"), "{:?}", cold.timeline());
    cold.start().unwrap();
    console.expect("tally\n");
    kill(&cold);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_damaged_state_is_an_error_and_leaves_nothing() {
    let host = Host::new();
    let clone_bundle = bundle_of_a_clone(&host, "fill=1");
    let state = clone_bundle.with_file_name("state");
    let sound = fs::read(&state).unwrap();
    for at in [0, sound.len() / 2, sound.len() - 1] {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        fs::write(&state, &bytes).unwrap();
        let (mut spec, _console) = go_on(&host, &clone_bundle);
        spec.on_incompatible = OnIncompatible::Boot;
        let err = host.engine.create(spec).unwrap_err();
        assert!(err.chain().contains("damaged") || err.chain().contains("no RAM snapshot"), "{}", err.chain());
    }
    fs::write(&state, &sound).unwrap();
    File::options().write(true).open(clone_bundle.with_file_name("memory")).unwrap().set_len(4096).unwrap();
    let err = host.engine.create(go_on(&host, &clone_bundle).0).unwrap_err();
    assert!(err.chain().contains("4096 bytes"), "{}", err.chain());
    assert_eq!(fs::read_dir(host.settings.paths.runtime.join("machines/engine-test")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.settings.paths.runtime.join("uids")).unwrap().count(), 0);
}

/// Not a test of its own: the engine that `an_engine_killed_in_the_middle_loses_nothing` kills.
#[test]
#[ignore = "needs /dev/kvm and root"]
fn engine_to_be_killed_in_a_snapshot() {
    let Some(dir) = std::env::var_os("ENGINE_TEST_SNAPSHOT").map(PathBuf::from) else { return };
    let host = Host::with(|settings| settings.paths.runtime = dir.join("run"));
    let (machine, _console, bundle) = tally(&host, "fill=32 dirty=512");
    fs::write(dir.join("bundle.tmp"), bundle.to_str().unwrap()).unwrap();
    fs::rename(dir.join("bundle.tmp"), dir.join("bundle")).unwrap();
    loop {
        let into = dir.join("into");
        let _ = fs::remove_dir_all(&into);
        fs::create_dir(&into).unwrap();
        take(&machine, &into, DIFF);
        if Record::load(&bundle).unwrap().disk.unwrap().frozen.len() > 25 {
            break;
        }
    }
    std::mem::forget(host);
    machine.wait();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn an_engine_killed_in_the_middle_loses_nothing() {
    let host = Host::new();
    for delay in [0, 5, 20, 60, 150] {
        let dir = host.dir.path().join(unique("killed"));
        fs::create_dir(&dir).unwrap();
        let mut engine = Command::new(std::env::current_exe().unwrap())
            .args(["engine_to_be_killed_in_a_snapshot", "--exact", "--ignored", "--nocapture"])
            .env("ENGINE_TEST_SNAPSHOT", &dir)
            .env("TMPDIR", host.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the machine runs", || dir.join("bundle").exists());
        std::thread::sleep(Duration::from_millis(delay));
        engine.kill().unwrap();
        engine.wait().unwrap();
        let bundle = PathBuf::from(fs::read_to_string(dir.join("bundle")).unwrap());
        // The VMM notices by itself; its lock ends with it.
        let begin = Instant::now();
        let opened = loop {
            match Bundle::open(&bundle, "a test", false) {
                Err(ovms_bundle::Error::InUse { .. }) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => break other.unwrap(),
            }
        };
        let stack = opened.disk.unwrap().into_stack().unwrap();
        let mut count = [0; 512];
        stack.read_at(4096, &mut count).unwrap();
        // Eight bytes of a number, over and over: not torn between two tops.
        assert!(count.chunks(8).all(|bytes| bytes == &count[..8]), "after {delay} ms");
        let into = dir.join("into");
        if into.join("snapshot.json").exists() {
            SnapshotRecord::load(&into).unwrap();
        }
        let settings = Host::with(|settings| settings.paths.runtime = dir.join("run"));
        settings.engine.sweep("engine-test");
        assert!(settings.engine.list().is_empty());
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn events_tell_a_stopping_snapshot() {
    let host = Host::new();
    let (machine, console, _) = tally(&host, "fill=1");
    let (tell, events) = std::sync::mpsc::channel();
    machine.subscribe(move |event| tell.send(event.clone()).unwrap());
    take(&machine, &empty_dir(&host), SnapshotOptions { full: false, stop: true });
    machine.resume().unwrap();
    let seen: Vec<_> = events.try_iter().filter(|event| !matches!(event, MachineEvent::Started)).collect();
    assert_eq!(seen, [MachineEvent::Paused, MachineEvent::Resumed]);
    assert_good(&machine, console);
}
