//! Machines that go on from a snapshot's unpacked files.

mod common;

use common::capture::{Inside, Snapshot};
use common::{guest, Setup};
use ovms_proto::control::{Command, ExitReason};

/// The count in the last whole line of what `tally` said.
fn last_count(said: &str) -> u64 {
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.lines().rev().find_map(|line| line.strip_prefix("count "));
    last.unwrap_or_else(|| panic!("no count in {said:?}")).parse().unwrap()
}

/// A counting guest that has come to 3 or a little further.
fn counting(setup: Setup) -> (Snapshot, u64) {
    let mut inside = Inside::boot(setup);
    let count = last_count(inside.run_until("count 3\n"));
    (inside.save(), count)
}

/// Lets a counting machine go on, and gives what it said after its last count before.
fn goes_on(setup: Setup, count: u64) {
    let mut vmm = setup.start();
    vmm.command(Command::Run);
    vmm.expect(&format!("count {}\n", count + 4));
    vmm.command(Command::PowerButton);
    let (reason, said, status) = vmm.end();
    assert_eq!((reason, status), (ExitReason::PowerOff, 0), "{said}");
    assert!(said.contains("all good at "), "{said}");
    assert!(!said.contains("tally"), "it has booted again: {said}");
    let first = said.lines().find_map(|line| line.strip_prefix("count "));
    if let Some(first) = first.and_then(|first| first.parse::<u64>().ok()) {
        assert!(first >= count, "{count} then {said}");
    }
}

fn tally() -> Setup {
    Setup::new(guest("tally")).args("disk=0")
}

#[test]
#[ignore = "needs /dev/kvm"]
fn restored_machine_counts_on() {
    let (snapshot, count) = counting(tally().memory(128 << 20));
    goes_on(snapshot.setup(), count);
    goes_on(snapshot.setup(), count);
}
