//! RAM snapshots of running machines in the real VMM: what is in the blob is the machine at one instant.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{guest, Setup, Vmm};
use ovms_proto::control::{Answer, Command, Event, SnapshotCommand, SnapshotReport};
use ovms_state::{unpack, Blob, Limits};

const PAGE: u64 = 4096;
/// Where the guest `dirty` begins to write.
const START: u64 = 16 << 20;

fn blob() -> File {
    tempfile::tempfile().unwrap()
}

/// The guest `dirty`, which has passed over its memory once.
fn dirty(setup: fn(Setup) -> Setup, args: &str) -> Vmm {
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

/// The memory in a blob, unpacked.
fn memory_of(blob: &File) -> File {
    let (memory, state) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let blob = Blob::open(blob.try_clone().unwrap()).unwrap();
    unpack(
        vec![blob],
        &[format!("sha256:{}", "0".repeat(64))],
        (&memory, &state),
        2,
        Limits { memory: 1 << 40 },
        &mut |_, _| true,
    )
    .unwrap();
    memory
}

/// The first word of each page that `dirty` writes in `mib` MiB.
fn words(memory: &File, mib: u64) -> Vec<u64> {
    let mut word = [0; 8];
    (0..mib << 20)
        .step_by(PAGE as usize)
        .map(|offset| {
            memory.read_exact_at(&mut word, START + offset).unwrap();
            u64::from_ne_bytes(word)
        })
        .collect()
}

/// What `dirty` leaves at any instant: the number of a pass, then that of the one before.
fn assert_one_instant(words: &[u64]) {
    let (first, last) = (words[0], words[words.len() - 1]);
    let step = words.iter().position(|word| *word != first).unwrap_or(words.len());
    assert!(words[step..].iter().all(|word| *word == first - 1), "torn: {first} … {last}");
    assert!(first > 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_of_a_writing_guest_is_of_one_instant() {
    let mut vmm = dirty(|setup| setup, "mib=32");
    let file = blob();
    let report = take(&mut vmm, SnapshotCommand::default(), &[file.try_clone().unwrap()]);
    eprintln!("{report:?}");
    assert!(vmm.events().iter().any(|event| matches!(event, Event::SnapshotTaken { .. })));
    assert_one_instant(&words(&memory_of(&file), 32));
    vmm.command(Command::PowerButton);
    vmm.end();
}
