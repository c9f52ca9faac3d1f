//! Snapshots of a machine whose VMM the test plays, in process and over the machine's socket.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ovms_bundle::{holder, Bundle, Ram, TopPaths, SNAPSHOT_DISK};
use ovms_proto::control::{Event, FromVmm, Request};
use ovms_proto::machine::{Client, RequestError, ToMachine, SOCKET};
use ovms_state::{Fingerprint, PageRange, SnapshotWriter, WorkingSet};
use tempfile::TempDir;

use super::*;
use crate::machine::MachineEvent;
use crate::shared::Origin;
use crate::stage::{bundle, ram, stage_with, Stage, MEMORY};

const STOOD: u64 = 900;

/// A machine that runs from a bundle with a disk, and an empty directory for its snapshot.
fn scene(resumed: bool) -> (Stage, TempDir) {
    let stage = stage_with(|dir| (bundle(dir, resumed.then(|| ram(dir))), None));
    stage.start();
    (stage, tempfile::tempdir().unwrap())
}

fn take(machine: &Machine, dir: &TempDir, options: SnapshotOptions) -> Result<SnapshotRecord> {
    machine.snapshot(dir.path(), options, &mut |_| (), &|| false)
}

/// The VMM's next request, which must be one for a snapshot with a new top.
fn asked(stage: &Stage) -> (u64, SnapshotCommand, File) {
    let (request, fds) = stage.vmm.recv::<Request>().unwrap();
    let Command::Snapshot(command) = request.command else { panic!("{:?}", request.command) };
    let [blob, _data, _map] = <[OwnedFd; 3]>::try_from(fds).unwrap();
    (request.id, command, blob.into())
}

fn taken(stage: &Stage) {
    stage.say(&FromVmm::Event(Event::SnapshotTaken { stood_micros: STOOD }));
}

/// Completes the blob.
fn complete(stage: &Stage, id: u64, blob: File, parent: Option<String>) {
    let writer = SnapshotWriter::create(blob, MEMORY, parent).unwrap();
    writer.put(1, &[7; ovms_state::CHUNK]).unwrap();
    writer.finish(1, Fingerprint::default(), &[]).unwrap();
    let report = SnapshotReport { stood_micros: STOOD, ..SnapshotReport::default() };
    stage.say(&FromVmm::Reply { id, result: Ok(Answer::Snapshot(report)) });
}

fn refuse(stage: &Stage, id: u64) {
    stage.say(&FromVmm::Reply { id, result: Err("the disk is full".into()) });
}

fn disk(stage: &Stage) -> Disk {
    Record::load(&stage.machine.inner.origin.bundle).unwrap().disk.unwrap()
}

fn names(tops: &[TopPaths]) -> Vec<String> {
    tops.iter().map(|top| top.data.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

fn files(dir: &TempDir) -> usize {
    fs::read_dir(dir.path()).unwrap().count()
}

/// What lies beside the record: table, record and two files for each top, not counting who holds them.
fn bundle_files(stage: &Stage) -> usize {
    let dir = stage.machine.inner.origin.bundle.parent().unwrap().to_owned();
    let plain = |path: &PathBuf| path.extension().is_none_or(|extension| extension != "holder");
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(plain).count()
}

#[test]
fn a_snapshot_is_complete_and_the_record_lists_the_frozen_top() {
    let (stage, dir) = scene(false);
    let record = thread::scope(|scope| {
        let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions::default()).unwrap());
        let (id, command, blob) = asked(&stage);
        assert_eq!(command, SnapshotCommand { parent: None, stop: false });
        taken(&stage);
        // Other requests are answered meanwhile.
        let resizing = scope.spawn(|| stage.machine.resize_console(80, 25));
        stage.answer(Command::ResizeConsole { columns: 80, rows: 25 });
        resizing.join().unwrap().unwrap();
        complete(&stage, id, blob, None);
        taking.join().unwrap()
    });
    assert_eq!(SnapshotRecord::load(dir.path()).unwrap(), record);
    assert_eq!((record.machine.as_str(), record.image.as_deref()), ("ns/vm1", Some("sha256:11")));
    assert_eq!((record.ram.vcpus, record.ram.memory, record.ram.stood_micros), (1, MEMORY, STOOD));
    assert_eq!(record.disk.unwrap().virtual_size, 1 << 20);
    assert_eq!(files(&dir), 3);
    let disk = disk(&stage);
    assert_eq!((names(&disk.frozen), names(disk.top.as_slice())), (vec!["top.data".into()], vec!["top.data.1".into()]));
    let by = holder(&disk.top.clone().unwrap().data).unwrap();
    assert_eq!(by.text, "machine ns/vm1");
    let known = crate::record::read(stage.runtime.path(), "ns", "vm1").unwrap().unwrap();
    assert_eq!((known.state, known.tops), (State::Running, vec![disk.top.unwrap().data]));
    stage.kill();
}

#[test]
fn a_snapshot_of_a_guest_that_may_not_write_holds_what_its_disk_was_given_before() {
    let stage = stage_with(|dir| {
        let origin = bundle(dir, None);
        let stack = Bundle::open(&origin.bundle, "a test", false).unwrap().disk.unwrap().into_stack().unwrap();
        stack.write_at(0, &[0xa5; 4096]).unwrap();
        stack.flush().unwrap();
        (Origin { writable: false, ..origin }, None)
    });
    stage.start();
    let dir = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions::default()).unwrap());
        let (request, fds) = stage.vmm.recv::<Request>().unwrap();
        let [blob] = <[OwnedFd; 1]>::try_from(fds).unwrap();
        taken(&stage);
        complete(&stage, request.id, blob.into(), None);
        taking.join().unwrap();
    });
    let image = fs::read(dir.path().join(SNAPSHOT_DISK)).unwrap();
    assert!(image.windows(4096).any(|window| window == [0xa5; 4096]));
    assert_eq!(disk(&stage).frozen.len(), 0);
    stage.kill();
}

#[test]
fn a_snapshot_of_a_resumed_machine_names_its_chain_unless_it_is_full() {
    for full in [false, true] {
        let (stage, dir) = scene(true);
        let origin: Ram = stage.machine.inner.origin.ram.clone().unwrap();
        let record = thread::scope(|scope| {
            let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions { full, stop: false }).unwrap());
            let (id, command, blob) = asked(&stage);
            assert_eq!(command.parent.is_none(), full);
            taken(&stage);
            complete(&stage, id, blob, command.parent);
            taking.join().unwrap()
        });
        let chain = if full { vec![] } else { vec![origin.digest, origin.parents[0].clone()] };
        assert_eq!(record.ram.parents, chain);
        stage.kill();
    }
}

#[test]
fn a_stopping_snapshot_pauses_at_its_instant() {
    let (stage, dir) = scene(false);
    thread::scope(|scope| {
        let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions { full: false, stop: true }).unwrap());
        let (id, _, blob) = asked(&stage);
        taken(&stage);
        assert_eq!(stage.event(), MachineEvent::Paused);
        complete(&stage, id, blob, None);
        taking.join().unwrap();
    });
    assert_eq!(stage.machine.status().state, State::Paused);
    let known = crate::record::read(stage.runtime.path(), "ns", "vm1").unwrap().unwrap();
    assert_eq!(known.state, State::Paused);
    stage.kill();
}

#[test]
fn refused_before_the_instant_leaves_nothing_new() {
    let (stage, dir) = scene(false);
    let before = bundle_files(&stage);
    let err = thread::scope(|scope| {
        let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions::default()).unwrap_err());
        let (id, ..) = asked(&stage);
        refuse(&stage, id);
        taking.join().unwrap()
    });
    assert!(err.chain().contains("the disk is full"), "{}", err.chain());
    assert_eq!((files(&dir), bundle_files(&stage)), (0, before));
    let disk = disk(&stage);
    assert_eq!((disk.frozen.len(), names(disk.top.as_slice())), (0, vec!["top.data".into()]));
    assert_eq!(stage.machine.status().state, State::Running);
    stage.kill();
}

#[test]
fn refused_after_the_instant_keeps_the_frozen_top_and_lets_the_guest_go_on() {
    let (stage, dir) = scene(false);
    thread::scope(|scope| {
        let taking =
            scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions { full: false, stop: true }).unwrap_err());
        let (id, ..) = asked(&stage);
        taken(&stage);
        assert_eq!(stage.event(), MachineEvent::Paused);
        refuse(&stage, id);
        stage.answer(Command::Resume);
        assert_eq!(stage.event(), MachineEvent::Resumed);
        taking.join().unwrap();
    });
    assert_eq!((files(&dir), names(&disk(&stage).frozen)), (0, vec!["top.data".into()]));
    assert_eq!(stage.machine.status().state, State::Running);
    stage.kill();
}

#[test]
fn cancelled_before_and_after_the_instant_gives_up_and_leaves_the_directory_empty() {
    for after in [false, true] {
        let (stage, dir) = scene(false);
        let cancel = AtomicBool::new(false);
        let err = thread::scope(|scope| {
            let taking = scope.spawn(|| {
                let options = SnapshotOptions::default();
                stage
                    .machine
                    .snapshot(dir.path(), options, &mut |_| (), &|| cancel.load(Ordering::Acquire))
                    .unwrap_err()
            });
            let (id, ..) = asked(&stage);
            if after {
                taken(&stage);
            }
            cancel.store(true, Ordering::Release);
            let (request, _) = stage.vmm.recv::<Request>().unwrap();
            assert_eq!(request.command, Command::CancelSnapshot);
            refuse(&stage, id);
            stage.say(&FromVmm::Reply { id: request.id, result: Ok(Answer::Done) });
            taking.join().unwrap()
        });
        assert!(err.chain().contains("cancelled"), "{}", err.chain());
        assert_eq!((files(&dir), disk(&stage).frozen.len()), (0, usize::from(after)));
        stage.kill();
    }
}

#[test]
fn a_machine_that_dies_under_its_snapshot_leaves_a_record_that_is_sound() {
    let (stage, dir) = scene(false);
    thread::scope(|scope| {
        let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions::default()).unwrap_err());
        asked(&stage);
        stage.machine.kill().unwrap();
        assert_eq!(taking.join().unwrap().kind(), Kind::NotFound);
    });
    assert_eq!((files(&dir), names(disk(&stage).top.as_slice())), (0, vec!["top.data.1".into()]));
}

#[test]
fn a_blob_of_another_machine_is_not_passed_on() {
    let (stage, dir) = scene(false);
    let err = thread::scope(|scope| {
        let taking = scope.spawn(|| take(&stage.machine, &dir, SnapshotOptions::default()).unwrap_err());
        let (id, _, blob) = asked(&stage);
        taken(&stage);
        complete(&stage, id, blob, Some(format!("sha256:{}", "c".repeat(64))));
        taking.join().unwrap()
    });
    assert!(err.chain().contains("of another machine"), "{}", err.chain());
    assert_eq!(files(&dir), 0);
    stage.kill();
}

#[test]
fn an_instant_that_nobody_asked_for_ends_that_vmm() {
    let (stage, _dir) = scene(false);
    taken(&stage);
    assert!(stage.fault().contains("nobody has asked for"));
    let stage = stage_with(|dir| (bundle(dir, Some(ram(dir))), None));
    stage.say(&FromVmm::Event(Event::WorkingSetRecorded));
    assert!(stage.fault().contains("nobody waits for"));
}

#[test]
fn snapshot_into_a_full_or_missing_directory_returns_why_and_asks_nobody() {
    let (stage, dir) = scene(false);
    fs::write(dir.path().join("file"), "mine").unwrap();
    let err = take(&stage.machine, &dir, SnapshotOptions::default()).unwrap_err();
    assert_eq!(err.kind(), Kind::FailedPrecondition, "{}", err.chain());
    let err = stage.machine.snapshot(&dir.path().join("none"), SnapshotOptions::default(), &mut |_| (), &|| false);
    assert_eq!(err.unwrap_err().kind(), Kind::NotFound);
    assert_eq!((files(&dir), disk(&stage).frozen.len()), (1, 0));
    stage.kill();
}

#[test]
fn freeze_disk_changes_the_tops_and_a_refused_one_does_not() {
    let (stage, _dir) = scene(false);
    let before = bundle_files(&stage);
    thread::scope(|scope| {
        for refused in [true, false] {
            let freezing = scope.spawn(|| stage.machine.freeze_disk());
            let (request, fds) = stage.vmm.recv::<Request>().unwrap();
            assert_eq!((request.command, fds.len()), (Command::FreezeDisk { disk: 0 }, 2));
            let result = if refused { Err("no".into()) } else { Ok(Answer::Done) };
            stage.say(&FromVmm::Reply { id: request.id, result });
            assert_eq!(freezing.join().unwrap().is_err(), refused);
            assert_eq!(
                (disk(&stage).frozen.len(), bundle_files(&stage)),
                if refused { (0, before) } else { (1, before + 2) }
            );
        }
    });
    stage.kill();
}

#[test]
fn a_recorded_working_set_is_checked_and_kept_once() {
    let file = |set: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(set, 0).unwrap();
        file
    };
    let set = WorkingSet { ranges: vec![PageRange { first: 3, count: 5 }] };
    for (recorded, kept) in [(set.encode(), true), (b"no working set".to_vec(), false)] {
        let stage = stage_with(|dir| (bundle(dir, Some(ram(dir))), Some(file(&recorded))));
        let path = stage.runtime.path().join("working-set");
        stage.say(&FromVmm::Event(Event::WorkingSetRecorded));
        let begin = Instant::now();
        while kept && !path.exists() && begin.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(5));
        }
        if kept {
            assert_eq!(WorkingSet::read(&File::open(&path).unwrap(), MEMORY).unwrap(), set);
        } else {
            thread::sleep(Duration::from_millis(100));
            assert!(!path.exists());
        }
        stage.kill();
    }
}

fn socket(stage: &Stage) -> PathBuf {
    stage.runtime.path().join("machines/ns/vm1").join(SOCKET)
}

#[test]
fn another_process_takes_a_snapshot_over_the_socket() {
    let (stage, dir) = scene(false);
    let path = socket(&stage);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut said = Vec::new();
            let request = ToMachine::Snapshot { dir: dir.path().into(), full: false, stop: false };
            let stood = Client::connect(&path).unwrap().request(&request, &mut |text| said.push(text.to_owned()));
            (stood.unwrap(), said)
        });
        let (id, _, blob) = asked(&stage);
        taken(&stage);
        complete(&stage, id, blob, None);
        let (stood, said) = asking.join().unwrap();
        assert_eq!(stood, STOOD);
        assert!(said[0].contains("900 µs"), "{said:?}");
    });
    assert_eq!(files(&dir), 3);
    stage.kill();
    stage.machine.delete().unwrap();
    assert!(matches!(Client::connect(&path), Err(RequestError::Connect { .. })));
}

#[test]
fn a_client_that_hangs_up_cancels() {
    let (stage, dir) = scene(false);
    let client = Client::connect(&socket(&stage)).unwrap();
    let canceller = client.canceller().unwrap();
    thread::scope(|scope| {
        let request = ToMachine::Snapshot { dir: dir.path().into(), full: false, stop: false };
        let asking = scope.spawn(move || client.request(&request, &mut |_| ()));
        let (id, ..) = asked(&stage);
        canceller.cancel();
        assert!(matches!(asking.join().unwrap(), Err(RequestError::Closed)));
        let (cancel, _) = stage.vmm.recv::<Request>().unwrap();
        assert_eq!(cancel.command, Command::CancelSnapshot);
        refuse(&stage, id);
        stage.say(&FromVmm::Reply { id: cancel.id, result: Ok(Answer::Done) });
    });
    let begin = Instant::now();
    while files(&dir) > 0 && begin.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(files(&dir), 0);
    stage.kill();
}

#[test]
fn the_socket_bounds_its_clients_and_refuses_what_it_cannot_read() {
    use std::io::{Read, Write};
    let (stage, _dir) = scene(false);
    let path = socket(&stage);
    let connect = || std::os::unix::net::UnixStream::connect(&path).unwrap();
    let mut idle: Vec<_> = (0..8).map(|_| connect()).collect();
    let mut said = String::new();
    connect().read_to_string(&mut said).unwrap();
    assert!(said.contains("8 clients talk to machine vm1"), "{said}");
    idle[0].write_all(b"what?\n").unwrap();
    said.clear();
    idle[0].read_to_string(&mut said).unwrap();
    assert!(said.contains("cannot be read"), "{said}");
    drop(idle);
    // The others see that they are alone, each in its own time.
    let begin = Instant::now();
    let killed = loop {
        match Client::connect(&path).unwrap().request(&ToMachine::Kill, &mut |_| ()) {
            Err(RequestError::Refused { .. }) if begin.elapsed() < Duration::from_secs(10) => {
                thread::sleep(Duration::from_millis(5));
            }
            other => break other,
        }
    };
    assert_eq!(killed.unwrap(), 0);
    assert_eq!(stage.machine.wait().status, 137);
}

#[test]
fn what_the_machine_refuses_reaches_the_client_with_its_kind() {
    let stage = crate::stage::stage();
    let path = socket(&stage);
    let ask = |request: &ToMachine| Client::connect(&path).unwrap().request(request, &mut |_| ());
    let Err(RequestError::Refused { kind, message }) = ask(&ToMachine::Pause) else { panic!("it was not started") };
    assert_eq!(kind, ovms_proto::machine::RefusalKind::Precondition);
    assert!(message.contains("was not started"), "{message}");
    let request = ToMachine::Snapshot { dir: "relative".into(), full: false, stop: false };
    let Err(RequestError::Refused { kind, .. }) = ask(&request) else { panic!("the path is relative") };
    assert_eq!(kind, ovms_proto::machine::RefusalKind::Invalid);
    stage.kill();
}
