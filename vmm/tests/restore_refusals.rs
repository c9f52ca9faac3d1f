//! RAM snapshots that are damaged, hostile or of another machine: a clear message, and never more.

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use common::capture::{Inside, Snapshot};
use common::{guest, Disk, Setup};
use ovms_proto::control::{Command, FailureKind};
use serde_json::{json, Value};

fn snapshot() -> Snapshot {
    let mut inside = Inside::boot(Setup::new(guest("tally")).args("disk=0 period=2000"));
    inside.run_until("count 1\n");
    inside.save()
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// `snapshot` with another state file.
fn with_state(snapshot: &Snapshot, bytes: &[u8]) -> Setup {
    let state = tempfile::tempfile().unwrap();
    state.write_all_at(bytes, 0).unwrap();
    let mut setup = snapshot.setup();
    let index = setup.restore_config().state;
    setup.fds[index as usize] = OwnedFd::from(state);
    setup
}

#[test]
#[ignore = "needs /dev/kvm"]
fn damaged_state_is_refused_with_a_message() {
    let snapshot = snapshot();
    let good = bytes_of(&snapshot.state);
    for length in [0, 1, 63, 64, 1000, good.len() - 1] {
        let message = with_state(&snapshot, &good[..length]).refused();
        assert!(message.contains("the state of the RAM snapshot cannot be read"), "{length}: {message}");
    }
    for at in (0..good.len()).step_by(good.len() / 23) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let (kind, message) = with_state(&snapshot, &bad).refused_as();
        assert!(message.contains("the state of the RAM snapshot cannot be read"), "{at}: {message}");
        assert_eq!(kind, FailureKind::Other);
    }
    let message = with_state(&snapshot, b"#!/bin/sh\n").refused();
    assert!(message.contains("the state of the RAM snapshot cannot be read"), "{message}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn another_machine_is_refused_and_named() {
    let snapshot = snapshot();
    let cases = [
        (snapshot.setup().vcpus(2), "a machine with 1 vCPUs, this one has 2"),
        (snapshot.setup().memory(32 << 20), "the memory file of the snapshot has 67108864 bytes"),
        (Disk::new(1 << 20).add_to(snapshot.setup()), "the machine's devices: found virtio-blk/0, virtio-console"),
    ];
    for (setup, expected) in cases {
        let message = setup.refused();
        assert!(message.contains(expected), "{message}");
    }
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(32 << 20).unwrap();
    let mut setup = snapshot.setup().memory(32 << 20);
    let index = setup.restore_config().memory;
    setup.fds[index as usize] = memory.into();
    let (kind, message) = setup.refused_as();
    assert!(message.contains("with 67108864 bytes of memory, this one has 33554432"), "{message}");
    assert_eq!(kind, FailureKind::Incompatible);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn host_without_a_feature_is_refused_and_the_feature_is_named() {
    let snapshot = snapshot();
    let leaf =
        |function, index| move |entry: &&mut ovms_state::CpuidEntry| (entry.function, entry.index) == (function, index);
    let needs = [
        // Bits that no host of today has: AMX is never offered, 3DNow! is gone.
        snapshot.changed(|print, _| print.cpuid.iter_mut().find(leaf(7, 0)).unwrap().edx |= 1 << 24),
        snapshot.changed(|print, _| print.cpuid.iter_mut().find(leaf(0, 0)).unwrap().ebx = 0x6972_7943),
        snapshot.changed(|print, _| print.capabilities.push("time-travel".into())),
        snapshot.with_value("vcpu/0", "/msrs", json!([[0xdead_beefu32, 1]])),
    ];
    let messages = ["amx_tile", "the processor's vendor", "the KVM capability time-travel", "MSR 0xdeadbeef"];
    for (snapshot, expected) in needs.iter().zip(messages) {
        let (kind, message) = snapshot.setup().refused_as();
        assert!(message.contains(expected), "{expected}: {message}");
        assert_eq!(kind, FailureKind::Incompatible, "{message}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn sections_too_few_or_too_many_are_refused() {
    let snapshot = snapshot();
    let without = |kind: &'static str| snapshot.changed(|_, sections| sections.retain(|section| section.kind != kind));
    for kind in ["machine", "clock", "vcpu/0", "virtio-rng", "pci-root", "serial", "ioapic", "vmgenid"] {
        let message = without(kind).setup().refused();
        assert!(message.contains(&format!("holds no state of part {kind}")), "{message}");
    }
    let more = snapshot.changed(|_, sections| {
        let mut copy = sections[0].clone();
        copy.kind = "flux".into();
        sections.push(copy);
    });
    let message = more.setup().refused();
    assert!(message.contains("the state of part flux, which this machine does not have"), "{message}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn hostile_values_are_refused_or_hurt_the_guest_alone() {
    let snapshot = snapshot();
    let max = json!(u64::MAX);
    // KVM's structures are saved as the digits of their bytes.
    let full = |bytes: usize| json!("ff".repeat(bytes));
    let cases: [(&str, &str, Value); 17] = [
        ("vcpu/0", "/sregs", full(312)),
        ("vcpu/0", "/sregs", full(313)),
        ("vcpu/0", "/regs", full(144)),
        ("vcpu/0", "/mp_state", full(4)),
        ("vcpu/0", "/events", full(64)),
        ("vcpu/0", "/xsave", full(4096)),
        ("vcpu/0", "/xcrs", full(392)),
        ("vcpu/0", "/debug", full(128)),
        ("vcpu/0", "/apic", full(1024)),
        ("vcpu/0", "/msrs", json!([[0x10, u64::MAX], [0x6e0, 1], [0x4b56_4d01, u64::MAX], [0xc000_0080u32, u64::MAX]])),
        ("clock", "/clock", max.clone()),
        ("clock", "/real", json!(0)),
        ("ioapic", "/pins/3/wires", json!(1)),
        ("virtio-rng", "/config/bytes/0", json!(0)),
        ("virtio-rng", "/common/status", json!(0x0f)),
        ("serial", "/input", json!(vec![0; 9000])),
        ("rtc", "/index", json!(200)),
    ];
    for (kind, pointer, value) in cases {
        let changed = snapshot.with_value(kind, pointer, value);
        let mut vmm = changed.setup().spawn();
        // Refused with a message, or a machine whose guest may be lost but which still obeys.
        if vmm.configured() {
            vmm.command(Command::Run);
            std::thread::sleep(std::time::Duration::from_millis(20));
            let _ = vmm.try_last(Command::Kill);
        }
        let code = vmm.child.wait().unwrap().code();
        assert!(matches!(code, Some(126 | 137 | 139 | 0)), "{kind}{pointer}: {code:?}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn flipped_bits_behind_right_checksums_are_refused_or_hurt_the_guest_alone() {
    let snapshot = snapshot();
    let kinds: Vec<_> = snapshot.sections.iter().map(|section| section.kind.clone()).collect();
    let mut ran = 0;
    for number in 0..96_usize {
        let kind = &kinds[number % kinds.len()];
        let changed = snapshot.changed(|_, sections| {
            let payload = &mut sections.iter_mut().find(|section| section.kind == *kind).unwrap().payload;
            // Everywhere in the section, and in digits a digit.
            let at = number * 7919 % payload.len();
            payload[at] ^= 1;
        });
        let mut vmm = changed.setup().spawn();
        if vmm.configured() {
            ran += 1;
            vmm.command(Command::Run);
            std::thread::sleep(std::time::Duration::from_millis(10));
            let _ = vmm.try_last(Command::Kill);
        }
        let code = vmm.child.wait().unwrap().code();
        assert!(matches!(code, Some(126 | 137 | 139 | 0)), "{kind}, {number}: {code:?}");
    }
    eprintln!("{ran} of 96 machines ran");
    assert!(ran > 10 && ran < 96, "{ran}");
}
