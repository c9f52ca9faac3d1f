//! RAM snapshots that earlier versions wrote, and that every later one must restore.
//!
//! `golden/<version>/base` holds 4 MiB of memory, `golden/<version>/diff` is a diff on it, `golden/<version>/working-set` is
//! of the same machine. A new format epoch adds a directory; none is ever changed.
//! `cargo run -p ovms-state --example write-golden -- libs/state/tests/golden/<version>` writes a new one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ovms_state::{unpack, Arch, Blob, Limits, StateFile, WorkingSet};

mod content;
use content::{base, changed, fingerprint, sections, working_set, BASE, DIFF, MEMORY};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn restored(dir: &Path, chain: &[(&str, &str)]) -> Vec<u8> {
    let (memory, state) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let blobs = chain.iter().map(|(file, _)| Blob::open(File::open(dir.join(file)).unwrap()).unwrap()).collect();
    let names: Vec<_> = chain.iter().map(|(_, name)| (*name).to_owned()).collect();
    unpack(blobs, &names, (&memory, &state), 2, Limits { memory: 1 << 30 }, &mut |_, _| true).unwrap();
    let (head, found) = StateFile::read(&state).unwrap();
    assert_eq!((head.arch, head.vcpus, head.memory), (Arch::X86_64, 2, MEMORY as u64));
    assert_eq!((head.fingerprint, found), (fingerprint(), sections()));
    let mut bytes = vec![0; MEMORY];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn snapshots_of_every_version_are_restored() {
    let mut versions = 0;
    for entry in fs::read_dir(root()).unwrap() {
        let dir = entry.unwrap().path();
        assert!(restored(&dir, &[("base", BASE)]) == base(), "{}", dir.display());
        assert!(restored(&dir, &[("diff", DIFF), ("base", BASE)]) == changed(), "{}", dir.display());
        let set = WorkingSet::read(&File::open(dir.join("working-set")).unwrap(), MEMORY as u64).unwrap();
        assert_eq!(set, working_set());
        versions += 1;
    }
    assert!(versions >= 1);
}
