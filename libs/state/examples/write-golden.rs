//! Writes the golden RAM snapshots of this version into a new directory; see `tests/golden.rs`.

use std::fs::{self, File};
use std::path::PathBuf;

use ovms_state::{SnapshotWriter, CHUNK};

#[path = "../tests/content/mod.rs"]
#[allow(dead_code, reason = "the digest of the diff is the test's alone")]
mod content;
use content::{base, changed, fingerprint, sections, working_set, BASE, MEMORY};

fn main() {
    let dir = PathBuf::from(std::env::args_os().nth(1).expect("a directory that does not exist yet"));
    fs::create_dir(&dir).unwrap();
    let (old, new) = (base(), changed());
    for (name, data, parent) in [("base", &old, None), ("diff", &new, Some(&old))] {
        let file = File::options().read(true).write(true).create_new(true).open(dir.join(name)).unwrap();
        let writer = SnapshotWriter::create(file, MEMORY as u64, parent.map(|_| BASE.to_owned())).unwrap();
        for (i, chunk) in data.chunks(CHUNK).enumerate() {
            match parent {
                Some(old) if old[i * CHUNK..][..chunk.len()] == *chunk => writer.same_as_parent(i as u64).unwrap(),
                _ => drop(writer.put(i as u64, chunk).unwrap()),
            }
        }
        writer.finish(2, fingerprint(), &sections()).unwrap();
    }
    fs::write(dir.join("working-set"), working_set().encode()).unwrap();
}
