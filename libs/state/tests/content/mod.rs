//! What the golden RAM snapshots hold. It never changes: files of earlier versions hold it.

use ovms_state::{CpuidEntry, DiskPrint, Fingerprint, PageRange, Section, WorkingSet, CHUNK};

/// Bytes of memory.
pub const MEMORY: usize = 4 << 20;
/// The digests by which the golden chains know their parts; what the files' own are plays no part here.
pub const BASE: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";
/// See [`BASE`].
pub const DIFF: &str = "sha256:2222222222222222222222222222222222222222222222222222222222222222";

/// A byte of every kind of chunk: zero, compressible, noise, partly zero.
pub fn base() -> Vec<u8> {
    let mut data = vec![0; MEMORY];
    data[..CHUNK].iter_mut().enumerate().for_each(|(i, b)| *b = (i / 64) as u8);
    let mut state = 1_u64;
    data[2 * CHUNK..2 * CHUNK + 8192].iter_mut().for_each(|b| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *b = (state >> 40) as u8;
    });
    let noise: Vec<u8> = (0..CHUNK)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as u8
        })
        .collect();
    data[5 * CHUNK..6 * CHUNK].copy_from_slice(&noise);
    data[MEMORY - 1] = 0xa5;
    data
}

/// What the diff makes of it: a chunk changed, one zeroed, one filled.
pub fn changed() -> Vec<u8> {
    let mut data = base();
    data[77] = 0xff;
    data[2 * CHUNK..3 * CHUNK].fill(0);
    data[9 * CHUNK..10 * CHUNK].fill(3);
    data
}

/// The host.
pub fn fingerprint() -> Fingerprint {
    let leaf = CpuidEntry { function: 7, index: 0, flags: 1, eax: 1, ebx: 0x20, ecx: 0, edx: 0 };
    Fingerprint {
        vmm: "0.1.0".into(),
        cpuid: vec![leaf],
        capabilities: vec!["irqchip-split".into()],
        tsc_khz: 2_399_998,
        devices: vec!["serial".into(), "virtio-blk/0".into()],
        disks: vec![DiskPrint { size: 1 << 30, read_only: false }],
        taken: 1_760_000_000_000_000_000,
    }
}

/// The state.
pub fn sections() -> Vec<Section> {
    let section = |kind: &str, payload: &[u8]| Section { kind: kind.into(), version: 1, payload: payload.to_vec() };
    vec![section("vcpu/0", br#"{"rip":4096}"#), section("serial", &[0, 1, 0xff])]
}

/// Pages of a restore.
pub fn working_set() -> WorkingSet {
    WorkingSet { ranges: vec![PageRange { first: 0, count: 3 }, PageRange { first: 1000, count: 24 }] }
}
