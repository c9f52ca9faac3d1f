//! RAM snapshots of running machines in the real VMM: what is in the blob is the machine at one instant.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{guest, Disk, Setup, Vmm};
use ovms_proto::control::{Answer, Command, Event, ExitReason, MachineState, SnapshotCommand, SnapshotReport};
use ovms_state::{unpack, Blob, Limits};

const PAGE: u64 = 4096;
/// Where the guest `dirty` begins to write.
const START: u64 = 16 << 20;

fn blob() -> File {
    tempfile::tempfile().unwrap()
}

/// The guest `dirty`, which has passed over its memory once.
fn dirty(setup: impl Fn(Setup) -> Setup, args: &str) -> Vmm {
    let mut vmm = setup(Setup::new(guest("dirty")).args(args)).start();
    vmm.command(Command::Run);
    vmm.expect("dirty\n");
    vmm
}

fn take(vmm: &mut Vmm, command: SnapshotCommand, files: &[File]) -> SnapshotReport {
    match vmm.try_command_with(Command::Snapshot(command), files) {
        Ok(Answer::Snapshot(report)) => report,
        other => panic!("no snapshot: {other:?}"),
    }
}

/// The digest that stands for the blob number `number` of a chain.
fn digest(number: usize) -> String {
    format!("sha256:{number:064}")
}

/// A chain of blobs, newest first, unpacked to state and memory; the oldest is number 0. The memory lies in `place`.
fn unpacked(chain: &[&File], place: &str) -> (File, File) {
    let memory = tempfile::tempfile_in(place).unwrap();
    let state = tempfile::tempfile().unwrap();
    let blobs = chain.iter().map(|blob| Blob::open(blob.try_clone().unwrap()).unwrap()).collect();
    let names: Vec<_> = (0..chain.len()).rev().map(digest).collect();
    unpack(blobs, &names, (&memory, &state), 2, Limits { memory: 1 << 40 }, &mut |_, _| true).unwrap();
    (state, memory)
}

fn memory_of(blob: &File) -> File {
    unpacked(&[blob], "/tmp").1
}

/// A machine that goes on from a chain of blobs.
fn restored(chain: &[&File], place: &str) -> Setup {
    let (state, memory) = unpacked(chain, place);
    Setup::restore(state.into(), memory.into())
}

/// The first word of each page that `dirty` writes in `mib` MiB.
fn words(memory: &File, mib: u64) -> Vec<u64> {
    words_at(memory, START, mib << 20)
}

fn words_at(memory: &File, start: u64, length: u64) -> Vec<u64> {
    let mut word = [0; 8];
    let pages = (0..length).step_by(PAGE as usize);
    pages
        .map(|offset| {
            memory.read_exact_at(&mut word, start + offset).unwrap();
            u64::from_ne_bytes(word)
        })
        .collect()
}

/// What `dirty` leaves at any instant: the number of a pass, then that of the one before, modulo `modulus`.
fn assert_one_instant(words: &[u64], modulus: u64) {
    let before = words[0].checked_sub(1).unwrap_or(modulus - 1);
    let step = words.iter().position(|word| *word != words[0]).unwrap_or(words.len());
    let torn = words[step..].iter().position(|word| *word != before);
    assert_eq!(torn.map(|at| (step, step + at, words[step + at])), None, "torn; the first is {}", words[0]);
}

fn assert_torn_nowhere(blob: &File, mib: u64) {
    assert_one_instant(&words(&memory_of(blob), mib), u64::MAX);
}

fn end(mut vmm: Vmm) {
    vmm.command(Command::PowerButton);
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
}

fn check_one_instant(setup: fn(Setup) -> Setup, args: &str, barrier: bool) {
    let mut vmm = dirty(setup, args);
    for _ in 0..2 {
        let file = blob();
        let report = take(&mut vmm, SnapshotCommand::default(), &[file.try_clone().unwrap()]);
        eprintln!("{args}: {report:?}");
        assert_eq!(report.barrier, barrier);
        assert_eq!(report.bytes, file.metadata().unwrap().len());
        assert_torn_nowhere(&file, 32);
    }
    let stood = |event: &&Event| matches!(event, Event::SnapshotTaken { stood_micros } if *stood_micros > 0);
    assert_eq!(vmm.events().iter().filter(stood).count(), 2);
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_of_a_writing_guest_is_of_one_instant() {
    check_one_instant(Setup::userfault, "mib=32", true);
    check_one_instant(Setup::userfault, "mib=32 rate=50", true);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_without_a_barrier_is_of_one_instant() {
    check_one_instant(|setup| setup, "mib=32", false);
    check_one_instant(|setup| setup, "mib=32 rate=2", false);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_of_four_writing_processors_is_of_one_instant() {
    let mut vmm = dirty(|setup| setup.userfault().vcpus(4), "mib=32 cpus=4");
    let file = blob();
    take(&mut vmm, SnapshotCommand::default(), &[file.try_clone().unwrap()]);
    let memory = memory_of(&file);
    assert_one_instant(&words(&memory, 32), u64::MAX);
    for processor in 1..4 {
        let words: Vec<_> = words_at(&memory, processor << 17, 1 << 17).iter().map(|word| word & 0xffff).collect();
        assert!(words[0] > 0, "processor {processor} has not run");
        assert_one_instant(&words, 1 << 16);
    }
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_processor_goes_on_from_a_snapshot_of_four_that_write() {
    let mut vmm = dirty(|setup| setup.userfault().vcpus(4), "mib=16 cpus=4");
    let first = blob();
    take(&mut vmm, SnapshotCommand::default(), &[first.try_clone().unwrap()]);
    end(vmm);
    let mut clone = restored(&[&first], "/tmp").vcpus(4).userfault().start();
    clone.command(Command::Run);
    std::thread::sleep(Duration::from_millis(800));
    let second = blob();
    take(&mut clone, SnapshotCommand::default(), &[second.try_clone().unwrap()]);
    end(clone);
    let [before, after] = [&first, &second].map(memory_of);
    let [old, new] = [&before, &after].map(|memory| words(memory, 16)[0]);
    assert!(new > old, "the first processor was in pass {old} and is in pass {new}");
    for processor in 1..4 {
        let [old, new] = [&before, &after].map(|memory| {
            let words: Vec<_> = words_at(memory, processor << 17, 1 << 17).iter().map(|word| word & 0xffff).collect();
            assert_one_instant(&words, 1 << 16);
            words
        });
        assert!(old != new, "processor {processor} stands in pass {}", old[0]);
    }
    // And from a snapshot of the clone.
    let mut again = restored(&[&second], "/tmp").vcpus(4).start();
    again.command(Command::Run);
    end(again);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_beyond_4_gib_goes_through_a_snapshot_and_a_diff() {
    // 16 MiB on either side of the hole, with what the guest itself looks through at its end.
    let args = "disk=0 at=3056 fill=32 dirty=64 period=10";
    let mut vmm = Setup::new(guest("tally")).memory(5 << 30).userfault().args(args).start();
    vmm.command(Command::Run);
    vmm.expect("count 20\n");
    let base = blob();
    let report = take(&mut vmm, SnapshotCommand::default(), &[base.try_clone().unwrap()]);
    assert!(report.content >= 32 << 20 && report.bytes < 64 << 20, "{report:?}");
    assert_good(vmm);
    let (state, memory) = unpacked(&[&base], "/tmp");
    // `tally` signs its pages: the first one behind the hole is that with the number 4096.
    assert_eq!(words_at(&memory, 3 << 30, PAGE), [4097_u64.wrapping_mul(0x9e37_79b9_7f4a_7c15)]);
    let mut clone = Setup::restore(state.into(), memory.into()).memory(5 << 30).userfault().start();
    clone.command(Command::Run);
    std::thread::sleep(Duration::from_millis(100));
    let diff = blob();
    let command = SnapshotCommand { parent: Some(digest(0)), stop: false };
    let report = take(&mut clone, command, &[diff.try_clone().unwrap()]);
    assert!(report.content <= 40 << 20, "{report:?}");
    assert_good(clone);
    let mut last = restored(&[&diff, &base], "/tmp").memory(5 << 30).start();
    last.command(Command::Run);
    assert_good(last);
}

/// Ends a machine with `tally`, which looks through its memory.
fn assert_good(mut vmm: Vmm) {
    vmm.command(Command::PowerButton);
    let (reason, said, _) = vmm.end();
    assert!(reason == ExitReason::PowerOff && said.contains("\nall good at "), "{said}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_of_a_paused_machine_leaves_it_paused() {
    let mut vmm = dirty(Setup::userfault, "mib=16");
    vmm.command(Command::Pause);
    let files = [blob(), blob()];
    for file in &files {
        let report = take(&mut vmm, SnapshotCommand::default(), &[file.try_clone().unwrap()]);
        assert_eq!((report.stood_micros, vmm.status().state), (0, MachineState::Paused));
        assert_torn_nowhere(file, 16);
    }
    let [first, second] = files.each_ref().map(|file| words(&memory_of(file), 16));
    assert!(first == second, "a paused guest writes nothing");
    vmm.command(Command::Resume);
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn stopping_snapshot_leaves_the_machine_as_it_is_in_the_blob() {
    let mut vmm = dirty(Setup::userfault, "mib=16");
    let files = [blob(), blob()];
    let stop = SnapshotCommand { stop: true, ..Default::default() };
    take(&mut vmm, stop, &[files[0].try_clone().unwrap()]);
    assert_eq!(vmm.status().state, MachineState::Paused);
    take(&mut vmm, SnapshotCommand::default(), &[files[1].try_clone().unwrap()]);
    let [first, second] = files.each_ref().map(|file| words(&memory_of(file), 16));
    assert!(first == second, "the guest has gone on");
    vmm.command(Command::Resume);
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn commands_are_answered_while_a_snapshot_is_taken_and_a_second_one_is_refused() {
    for barrier in [true, false] {
        let setup = |setup: Setup| if barrier { setup.userfault() } else { setup };
        let mut vmm = dirty(setup, "mib=32");
        let file = blob();
        let first = vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[file.try_clone().unwrap()]);
        let second = vmm.try_command_with(Command::Snapshot(SnapshotCommand::default()), &[blob()]);
        assert!(second.unwrap_err().contains("another snapshot of the machine is being taken"));
        assert!(vmm.try_command(Command::FreezeDisk { disk: 0 }).is_err());
        for _ in 0..20 {
            vmm.command(Command::Pause);
            assert_eq!(vmm.status().state, MachineState::Paused);
            vmm.command(Command::Resume);
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(matches!(vmm.answer(first), Ok(Answer::Snapshot(_))));
        assert_torn_nowhere(&file, 32);
        assert_eq!(vmm.status().state, MachineState::Running);
        end(vmm);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn cancelled_snapshot_leaves_the_machine_running() {
    let mut vmm = dirty(Setup::userfault, "mib=32");
    vmm.command(Command::CancelSnapshot);
    for after_the_instant in [false, true] {
        let first = vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[blob()]);
        if after_the_instant {
            vmm.wait_event(|event| matches!(event, Event::SnapshotTaken { .. }));
        }
        vmm.command(Command::CancelSnapshot);
        assert_eq!(vmm.answer(first), Err("the snapshot was cancelled".into()));
        assert_eq!(vmm.status().state, MachineState::Running);
    }
    let file = blob();
    take(&mut vmm, SnapshotCommand::default(), &[file.try_clone().unwrap()]);
    assert_torn_nowhere(&file, 32);
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn blob_that_cannot_be_written_leaves_the_machine_running() {
    let limited = |setup: Setup| {
        let mut setup = setup.userfault();
        setup.config.jail.max_file_size = 1 << 20;
        setup
    };
    let mut vmm = dirty(limited, "mib=4 fill=1");
    let error = vmm.try_command_with(Command::Snapshot(SnapshotCommand::default()), &[blob()]).unwrap_err();
    assert!(error.contains("the RAM snapshot cannot be written") && error.contains("File too large"), "{error}");
    let full = tempfile::tempfile().unwrap();
    full.write_at(b"x", 0).unwrap();
    let error = vmm.try_command_with(Command::Snapshot(SnapshotCommand::default()), &[full]).unwrap_err();
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(vmm.status().state, MachineState::Running);
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn command_without_its_files_is_refused() {
    let mut vmm = Setup::new(guest("spin")).args("quiet=1").start();
    let early = vmm.try_command_with(Command::Snapshot(SnapshotCommand::default()), &[blob()]);
    assert!(early.unwrap_err().contains("not been started"));
    vmm.command(Command::Run);
    let cases = [
        (None, vec![], "the file for the blob must come with the command"),
        (None, vec![blob(), blob()], "more new tops came"),
        (Some(digest(0)), vec![blob()], "was not restored from a RAM snapshot"),
    ];
    for (parent, files, expected) in cases {
        let command = Command::Snapshot(SnapshotCommand { parent, stop: false });
        let error = vmm.try_command_with(command, &files).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    end(vmm);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_ends_before_the_instant_ends_its_snapshot() {
    let mut vmm = dirty(Setup::userfault, "mib=64 rate=20");
    let first = vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[blob()]);
    vmm.command(Command::PowerButton);
    assert_eq!(vmm.answer(first), Err("the guest ended before the snapshot was taken".into()));
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_ends_after_the_instant_leaves_a_whole_blob() {
    let mut vmm = dirty(Setup::userfault, "mib=32");
    let file = blob();
    let first = vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[file.try_clone().unwrap()]);
    vmm.wait_event(|event| matches!(event, Event::SnapshotTaken { .. }));
    vmm.command(Command::PowerButton);
    assert!(matches!(vmm.answer(first), Ok(Answer::Snapshot(_))));
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
    assert_torn_nowhere(&file, 32);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn kill_during_a_snapshot_ends_the_machine_at_once() {
    let mut vmm = dirty(Setup::userfault, "mib=32");
    let file = blob();
    vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[file.try_clone().unwrap()]);
    vmm.wait_event(|event| matches!(event, Event::SnapshotTaken { .. }));
    vmm.command(Command::Kill);
    assert_eq!(vmm.end().2, 137);
    assert!(Blob::open(file).is_err(), "nobody takes half a blob for a whole one");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_and_disk_of_a_machine_under_disk_load_are_of_one_instant() {
    let mut disk = Disk::new(1 << 20);
    let mut vmm = disk.add_to(Setup::new(guest("tally")).userfault().args("period=10 fill=8 dirty=64")).start();
    vmm.command(Command::Run);
    vmm.expect("count 20\n");
    for _ in 0..3 {
        let top = disk.add_top();
        let mut files = vec![blob()];
        files.extend(top);
        take(&mut vmm, SnapshotCommand::default(), &[files[0].try_clone().unwrap(), files.remove(1), files.remove(1)]);
        let mut clone = disk.fork().add_to(restored(&[&files[0]], "/tmp")).start();
        clone.command(Command::Run);
        clone.command(Command::PowerButton);
        let (reason, said, _) = clone.end();
        assert!(reason == ExitReason::PowerOff && said.contains("all good at "), "{said}");
        vmm.drain();
    }
    vmm.command(Command::PowerButton);
    let (_, said, _) = vmm.end();
    assert!(said.contains("all good at "), "{said}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshots_of_a_clone_are_of_one_instant_whole_or_as_a_diff() {
    let mut vmm = dirty(Setup::userfault, "mib=32 hot=4");
    let base = blob();
    take(&mut vmm, SnapshotCommand::default(), &[base.try_clone().unwrap()]);
    end(vmm);
    for (place, barrier) in [("/dev/shm", true), ("/tmp", false)] {
        let mut clone = restored(&[&base], place).userfault().start();
        clone.command(Command::Run);
        std::thread::sleep(Duration::from_millis(300));
        let (whole, diff) = (blob(), blob());
        let report = take(&mut clone, SnapshotCommand::default(), &[whole.try_clone().unwrap()]);
        eprintln!("{place}: {report:?}");
        assert_eq!(report.barrier, barrier);
        let command = SnapshotCommand { parent: Some(digest(0)), stop: false };
        let report = take(&mut clone, command, &[diff.try_clone().unwrap()]);
        eprintln!("{place}: {report:?}");
        assert!(report.content < 8 << 20, "{report:?}");
        end(clone);
        for chain in [&[&whole][..], &[&diff, &base]] {
            let memory = unpacked(chain, "/tmp").1;
            let words = words(&memory, 32);
            assert_one_instant(&words[..1024], u64::MAX);
            assert!(words[1024..].iter().all(|word| *word == 1) && words[0] > 1);
            end({
                let mut again = restored(chain, place).start();
                again.command(Command::Run);
                again
            });
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn what_a_disk_writes_into_memory_is_in_the_snapshot() {
    for barrier in [true, false] {
        let mut disk = Disk::new(1 << 20);
        let setup = disk.add_to(Setup::new(guest("dma")));
        let mut vmm = if barrier { setup.userfault() } else { setup }.start();
        vmm.command(Command::Run);
        vmm.expect("dma\n");
        for _ in 0..3 {
            let file = blob();
            let [data, map] = disk.add_top();
            take(&mut vmm, SnapshotCommand::default(), &[file.try_clone().unwrap(), data, map]);
            let memory = memory_of(&file);
            let [counted, read] = [24u64 << 20, 20 << 20].map(|place| words_at(&memory, place, PAGE)[0]);
            assert!(read == counted || read + 1 == counted, "the disk wrote {counted}, the blob has {read}");
        }
        end(vmm);
    }
}
