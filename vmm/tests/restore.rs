//! Machines that go on from a snapshot's unpacked files.

mod common;

use std::fs::{self, File};
use std::time::Duration;

use common::capture::{Inside, Snapshot};
use common::{guest, Disk, Setup};
use ovms_proto::control::{Command, Event, ExitReason};
use ovms_state::{Section, WorkingSet};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

/// Where the identifier of the machine's generation lies.
const GENERATION: u64 = 0xf_f000;

/// The count in the last whole line of what `tally` said.
fn last_count(said: &str) -> u64 {
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.lines().rev().find_map(|line| line.strip_prefix("count "));
    last.unwrap_or_else(|| panic!("no count in {said:?}")).parse().unwrap()
}

/// A counting guest that has come to 3 or a little further.
fn counting(setup: Setup) -> (Inside, u64) {
    let mut inside = Inside::boot(setup);
    let count = last_count(inside.run_until("count 3\n"));
    (inside, count)
}

/// Lets a counting machine that had come to `count` go on until it finds everything good.
fn goes_on(setup: Setup, count: u64) {
    let mut vmm = setup.start();
    vmm.command(Command::Run);
    vmm.expect(&format!("count {}\n", count + 4));
    vmm.command(Command::PowerButton);
    let (reason, said, status) = vmm.end();
    assert_eq!((reason, status), (ExitReason::PowerOff, 0), "{said}");
    assert!(said.contains("all good at "), "{said}");
    assert!(!said.contains("tally"), "it has booted again: {said}");
    let first = said.lines().find_map(|line| line.strip_prefix("count ")).unwrap();
    assert!(first.parse::<u64>().unwrap() >= count, "{count}, then {said}");
}

fn tally() -> Setup {
    Setup::new(guest("tally")).args("disk=0 period=2000")
}

#[test]
#[ignore = "needs /dev/kvm"]
fn restored_machines_count_on_from_one_snapshot() {
    let (inside, count) = counting(tally().memory(128 << 20));
    let snapshot = inside.save();
    for _ in 0..3 {
        goes_on(snapshot.setup(), count);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn restored_machine_has_its_memory_on_both_sides_of_the_hole() {
    for gib in [2, 5] {
        let (inside, count) = counting(tally().memory(gib << 30));
        let places: Vec<u64> = [1 << 30, (2 << 30) - 8, 4 << 30, (6 << 30) - 8]
            .into_iter()
            .filter(|place| *place < inside.ram.high_end().unwrap_or(inside.ram.low_end()))
            .collect();
        for place in &places {
            inside.ram.memory().write_obj(*place ^ 0x5a5a, GuestAddress(*place)).unwrap();
        }
        let snapshot = inside.save();
        let again = Inside::restore(snapshot.setup(), &snapshot);
        for place in &places {
            assert_eq!(again.ram.memory().read_obj::<u64>(GuestAddress(*place)).unwrap(), *place ^ 0x5a5a);
        }
        goes_on(snapshot.setup(), count);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn restored_machine_goes_on_with_its_disk() {
    let disk = Disk::new(1 << 20);
    let (inside, count) = counting(disk.add_to(Setup::new(guest("tally")).args("period=2000")));
    let snapshot = inside.save();
    assert_eq!(snapshot.fingerprint.disks.len(), 1);
    goes_on(disk.add_to(snapshot.setup()), count);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_processor_of_a_restored_machine_goes_on() {
    let mut inside = Inside::boot(Setup::new(guest("dirty")).vcpus(3).args("mib=2 rate=10 cpus=3"));
    inside.run_until("dirty\n");
    let snapshot = inside.save();
    let again = Inside::restore(snapshot.setup(), &snapshot);
    // Each of the other processors writes a counter of its own; the first one the pass over its memory.
    let counters = || [0x2_0000, 0x4_0000].map(|at| again.ram.memory().read_obj::<u16>(GuestAddress(at)).unwrap());
    let pass = || again.ram.memory().read_obj::<u64>(GuestAddress(16 << 20)).unwrap();
    let before = (counters(), pass());
    again.run_for(Duration::from_millis(800));
    let after = (counters(), pass());
    assert!(before.0.iter().zip(after.0).all(|(before, after)| *before != after), "{before:?} {after:?}");
    assert!(after.1 > before.1, "{before:?} {after:?}");
}

/// The payload of a section, without what goes on by itself: the clock, and what tells the guest that it was restored.
fn still(section: &Section) -> Value {
    let mut state: Value = serde_json::from_slice(&section.payload).unwrap();
    match section.kind.as_str() {
        "clock" | "vmgenid" => Value::Null,
        kind if kind.starts_with("vcpu/") => {
            state["msrs"].as_array_mut().unwrap().retain(|entry| entry[0] != 0x10);
            state
        }
        "acpi-pm" => {
            state["timer_nanos"] = Value::Null;
            state["gpe_status"] = Value::Null;
            state
        }
        _ => state,
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn machine_that_is_saved_restored_and_saved_is_the_same() {
    let disk = Disk::new(1 << 20);
    let setup = Setup::new(guest("tally")).vcpus(2).args("period=2000 console=hvc0");
    let (inside, _) = counting(disk.add_to(setup));
    let snapshot = inside.save();
    let again = Inside::restore(disk.add_to(snapshot.setup()), &snapshot).save();
    assert_eq!(again.sections.len(), snapshot.sections.len());
    for (before, after) in snapshot.sections.iter().zip(&again.sections) {
        assert_eq!((&before.kind, before.version), (&after.kind, after.version));
        assert_eq!(still(before), still(after), "{}", before.kind);
    }
    assert_eq!(again.fingerprint.cpuid, snapshot.fingerprint.cpuid);
    assert_eq!(again.fingerprint.devices, snapshot.fingerprint.devices);
    let owner = snapshot.sections.iter().find(|section| section.kind == "machine").unwrap();
    assert_eq!(owner.payload, br#"{"input":"virtio"}"#, "the last console= of the command line");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn each_restored_machine_has_a_generation_of_its_own_and_its_guest_is_told() {
    let (inside, _) = counting(tally());
    let snapshot = inside.save();
    let clones = [(); 2].map(|()| Inside::restore(snapshot.setup(), &snapshot));
    let generation = |inside: &Inside| inside.ram.memory().read_obj::<u128>(GuestAddress(GENERATION)).unwrap();
    let all = [generation(&inside), generation(&clones[0]), generation(&clones[1])];
    assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2] && !all.contains(&0), "{all:x?}");
    for clone in clones {
        let saved = clone.save();
        let pm = saved.sections.iter().find(|section| section.kind == "acpi-pm").unwrap();
        let pm: Value = serde_json::from_slice(&pm.payload).unwrap();
        assert_eq!(pm["gpe_status"], 1);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn time_goes_on_while_a_machine_is_away() {
    let (inside, _) = counting(tally());
    let snapshot = inside.save();
    std::thread::sleep(Duration::from_millis(1500));
    let again = Inside::restore(snapshot.setup(), &snapshot).save();
    let value = |snapshot: &Snapshot, kind: &str, pick: fn(&Value) -> u64| {
        let section = snapshot.sections.iter().find(|section| section.kind == kind).unwrap();
        pick(&serde_json::from_slice(&section.payload).unwrap())
    };
    let clock = |snapshot: &Snapshot| value(snapshot, "clock", |state| state["clock"].as_u64().unwrap());
    let real = |snapshot: &Snapshot| value(snapshot, "clock", |state| state["real"].as_u64().unwrap());
    let tsc = |snapshot: &Snapshot| {
        value(snapshot, "vcpu/0", |state| {
            let msrs = state["msrs"].as_array().unwrap();
            msrs.iter().find(|entry| entry[0] == 0x10).unwrap()[1].as_u64().unwrap()
        })
    };
    let away = real(&again) - real(&snapshot);
    assert!(away > 1_500_000_000);
    // Of two clocks that are read one after the other on a busy host.
    let close = |passed: u64| passed.abs_diff(away) < 200_000_000;
    assert!(close(clock(&again) - clock(&snapshot)), "{away} {}", clock(&again) - clock(&snapshot));
    let timer = |snapshot: &Snapshot| value(snapshot, "acpi-pm", |state| state["timer_nanos"].as_u64().unwrap());
    assert!(close(timer(&again) - timer(&snapshot)), "{away} {}", timer(&again) - timer(&snapshot));
    let khz = u64::from(snapshot.fingerprint.tsc_khz);
    let ticks = tsc(&again) - tsc(&snapshot);
    assert!(close(ticks * 1000 / khz * 1000), "{away} {ticks} at {khz} kHz");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn working_set_is_recorded_and_read_ahead() {
    let (inside, count) = counting(tally().memory(512 << 20));
    let snapshot = inside.save();
    let recorded = tempfile::tempfile().unwrap();
    let mut setup = snapshot.setup();
    setup.restore_config().record_working_set = Some(setup.fds.len() as u32);
    setup.fd(recorded.try_clone().unwrap());
    let mut vmm = setup.start();
    vmm.command(Command::Run);
    vmm.wait_event(|event| *event == Event::WorkingSetRecorded);
    vmm.command(Command::Kill);
    let set = WorkingSet::read(&recorded, 512 << 20).unwrap();
    let first_page = (16 << 20) / 4096;
    let holds = |page| set.ranges.iter().any(|range| (range.first..range.first + range.count).contains(&page));
    assert!(holds(first_page) && set.pages() < 8192, "{set:?}");
    let mut setup = snapshot.setup();
    setup.restore_config().working_set = Some(setup.fds.len() as u32);
    setup.fd(recorded);
    goes_on(setup, count);
    // One that is no working set is done without.
    let mut setup = snapshot.setup();
    setup.restore_config().working_set = Some(setup.fds.len() as u32);
    setup.fd(File::open("/dev/null").unwrap());
    goes_on(setup, count);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_ends_at_once_has_its_working_set_recorded() {
    let (inside, count) = counting(tally());
    let snapshot = inside.save();
    let recorded = tempfile::tempfile().unwrap();
    let mut setup = snapshot.setup();
    setup.restore_config().record_working_set = Some(setup.fds.len() as u32);
    setup.fd(recorded.try_clone().unwrap());
    let mut vmm = setup.start();
    vmm.command(Command::Run);
    vmm.command(Command::PowerButton);
    vmm.wait_event(|event| matches!(event, Event::Exited(_)));
    let at = |is: fn(&Event) -> bool| vmm.events().iter().position(is).unwrap();
    assert!(at(|event| *event == Event::WorkingSetRecorded) < at(|event| matches!(event, Event::Exited(_))));
    assert!(count >= 3 && WorkingSet::read(&recorded, 64 << 20).unwrap().pages() > 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn locked_memory_is_locked_on_fault_and_a_limit_is_named() {
    let (inside, count) = counting(tally().memory(256 << 20));
    let snapshot = inside.save();
    let locked = |vmm: &common::Vmm, field: &str| -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", vmm.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    };
    let mut setup = snapshot.setup();
    setup.restore_config().mlock = true;
    let vmm = setup.start();
    assert_eq!(locked(&vmm, "VmLck"), 256 << 10);
    assert!(locked(&vmm, "VmRSS") < 32 << 10, "only what is touched is in RAM");
    drop(vmm);
    let mut setup = snapshot.setup();
    setup.restore_config().mlock = true;
    goes_on(setup, count);
    let mut setup = snapshot.setup().without_locking();
    setup.restore_config().mlock = true;
    let message = setup.refused();
    assert!(message.contains("256 MiB of guest memory cannot be locked: raise RLIMIT_MEMLOCK"), "{message}");
}
