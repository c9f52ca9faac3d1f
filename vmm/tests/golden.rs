//! Real machines that earlier versions saved, and that every later one must decode and go on with.
//!
//! `golden/<version>/base` is the blob of a machine of two processors, 32 MiB and a disk, on which the guest `tally` counts;
//! `zstd` is the same with zstd frames for its memory, `diff` a diff on it, taken of a clone a little later; `base.disk` and
//! `diff.disk` are what each disk begins with, the rest of it is zero. None is ever changed. A new version of a section, or
//! of the format, adds a directory: `make guests`, then as root
//! `cargo run -p ovms-vmm --example write-golden-machine -- vmm/tests/golden/<version>`, which overwrites nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

#[allow(dead_code, reason = "each test file uses its part")]
#[path = "common/bare.rs"]
mod bare;
mod common;

use bare::{assert_same, Bare, Unpacked};
use common::{Disk, Setup};
use ovms_proto::control::{Command, ExitReason, FailureKind, FromVmm};
use ovms_vmm::saved::Saved;
use ovms_vmm::vcpu::state::VcpuV1;

/// The blobs of each machine, newest first, and the disk that goes with them.
const MACHINES: [(&[&str], &str); 3] =
    [(&["base"], "base.disk"), (&["zstd"], "base.disk"), (&["diff", "base"], "diff.disk")];

/// Each golden machine: its name, its snapshot, what its disk begins with.
fn machines() -> Vec<(String, Unpacked, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let versions: Vec<PathBuf> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!versions.is_empty());
    let machine = |version: &PathBuf, (blobs, disk): (&[&str], &str)| {
        let read = |name: &str| fs::read(version.join(name)).unwrap();
        let chain: Vec<_> = blobs.iter().map(|name| read(name)).collect();
        let name = format!("{}/{}", version.file_name().unwrap().display(), blobs[0]);
        (name, Unpacked::of(&chain.iter().map(Vec::as_slice).collect::<Vec<_>>()), read(disk))
    };
    versions.iter().flat_map(|version| MACHINES.map(|of| machine(version, of))).collect()
}

#[test]
fn every_section_of_a_golden_machine_is_decoded_and_saved_as_it_was() {
    for (name, golden, _) in machines() {
        let saved = bare::read(&golden.state, &golden.head).unwrap();
        let machine = Bare::new(&golden.head, &golden.map(), Some(&saved));
        machine.restore(&golden.sections).unwrap_or_else(|err| panic!("{name}: {err}"));
        let devices = machine.devices.save().unwrap();
        let (of_devices, others): (Vec<_>, Vec<_>) = golden
            .sections
            .iter()
            .cloned()
            .partition(|section| golden.head.fingerprint.devices.contains(&section.kind));
        assert_same(&of_devices, &devices);
        let kinds: Vec<_> = others.iter().map(|section| section.kind.as_str()).collect();
        assert_eq!(kinds, ["machine", "clock", "vcpu/0", "vcpu/1"], "{name}");
        for (index, section) in (0..).zip(&others[2..]) {
            assert_eq!(VcpuV1::load(section, index).unwrap().section(index).unwrap(), *section, "{name}");
        }
        let live = ["virtio-blk/0", "virtio-console", "virtio-rng", "virtio-balloon", "ioapic", "pci-root", "serial"];
        assert!(live.iter().all(|kind| devices.iter().any(|section| section.kind == *kind)), "{name}");
    }
}

#[test]
fn golden_memory_is_the_same_by_lz4_and_by_zstd_and_another_in_the_diff() {
    let bytes = |file: &File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).unwrap();
        bytes
    };
    let memories: Vec<_> = machines().iter().map(|(_, golden, _)| bytes(&golden.memory)).collect();
    for of_version in memories.chunks(MACHINES.len()) {
        let [base, zstd, diff] = of_version else { panic!("{}", of_version.len()) };
        assert!(base == zstd && base != diff);
        // `tally` signs each page of the MiB from 16 MiB up.
        let signed =
            |page: usize| base[(16 << 20) + page * 4096..][..8] == (page as u64 + 1).wrapping_mul(SALT).to_le_bytes();
        assert!((0..256).all(signed));
    }
}

/// Of test/guests/tally.c.
const SALT: u64 = 0x9e37_79b9_7f4a_7c15;

#[test]
#[ignore = "needs /dev/kvm"]
fn golden_machines_go_on_where_the_host_can() {
    for (name, golden, content) in machines() {
        let disk = Disk::new(golden.head.fingerprint.disks[0].size);
        disk.begin_with(&content);
        let setup = Setup::restore(golden.state.into(), golden.memory.into());
        let setup = disk.add_to(setup.vcpus(golden.head.vcpus).memory(golden.head.memory));
        let mut vmm = setup.spawn();
        match vmm.first() {
            FromVmm::Configured { .. } => {}
            FromVmm::Failed { kind: FailureKind::Incompatible, message } => {
                eprintln!("SKIPPED: {name} was taken on another kind of host: {message}");
                continue;
            }
            other => panic!("{name}: {other:?}"),
        }
        vmm.command(Command::Run);
        vmm.expect("count ");
        let first = first_count(&vmm.expect("\n"));
        vmm.expect(&format!("count {}\n", first + 3));
        vmm.command(Command::PowerButton);
        let (reason, said, _) = vmm.end();
        assert_eq!(reason, ExitReason::PowerOff, "{name}: {said}");
        assert!(said.contains("all good at ") && !said.contains("tally"), "{name}: {said}");
        assert!(first >= 3, "{name}: {said}");
    }
}

/// The first count of which a whole line was said.
fn first_count(said: &str) -> u64 {
    let lines = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    lines.filter_map(|line| line.trim_end().strip_prefix("count ")?.parse().ok()).next().unwrap_or(0)
}

#[test]
fn a_golden_machine_of_another_size_is_refused() {
    let (_, golden, _) = machines().remove(0);
    let mut config = bare::config(&golden.head);
    config.memory *= 2;
    let err = Saved::read(&golden.state, &config).unwrap_err();
    assert!(err.is_incompatible() && err.to_string().contains("33554432 bytes of memory"), "{err}");
}
