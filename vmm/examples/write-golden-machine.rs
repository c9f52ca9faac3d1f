//! Writes the golden machine of this version into a new directory; see `vmm/tests/golden.rs`. Needs root, /dev/kvm and
//! `make guests`.
//!
//! It is made by the library in this process, like the tests' captures: its blobs hold what a VMM of this version saves.

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ovms_state::{SnapshotWriter, CHUNK};
use serde_json::Value;
use twox_hash::XxHash3_128;

#[path = "../tests/common/bare.rs"]
#[allow(dead_code, reason = "what restores is the tests' alone")]
mod bare;
#[path = "../tests/common/mod.rs"]
mod common;

use common::capture::{Inside, Snapshot};
use common::{guest, Disk, Setup};

const MEMORY: u64 = 32 << 20;
/// Of the disk, as far as the guest writes it.
const DISK_BYTES: usize = 8192;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = PathBuf::from(std::env::args_os().nth(1).ok_or("which directory? One that does not exist yet")?);
    // Golden files are never changed.
    fs::create_dir(&dir)?;
    let disk = Disk::new(1 << 20);
    let setup = Setup::new(guest("tally")).vcpus(2).memory(MEMORY).args("period=2000 console=hvc0");
    let mut machine = Inside::boot(disk.add_to(setup));
    machine.run_until("count 3\n");
    let base = machine.save();
    machine.machine.devices().disks[0].flush()?;
    write(&dir, "base", &base, None, &disk)?;
    let blob = fs::read(dir.join("base"))?;
    fs::write(dir.join("zstd"), as_zstd(&blob)?)?;
    drop(machine);

    let mut clone = Inside::restore(disk.add_to(base.setup()), &base);
    clone.run_until("count ");
    clone.run_for(std::time::Duration::from_millis(200));
    let diff = clone.save();
    clone.machine.devices().disks[0].flush()?;
    write(&dir, "diff", &diff, Some(&base), &disk)
}

fn memory(snapshot: &Snapshot) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = vec![0; snapshot.size as usize];
    std::os::unix::fs::FileExt::read_exact_at(&snapshot.memory, &mut bytes, 0)?;
    Ok(bytes)
}

fn write(
    dir: &Path,
    name: &str,
    snapshot: &Snapshot,
    parent: Option<&Snapshot>,
    disk: &Disk,
) -> Result<(), Box<dyn Error>> {
    let file = File::options().read(true).write(true).create_new(true).open(dir.join(name))?;
    let writer = SnapshotWriter::create(file, snapshot.size, parent.map(|_| bare::BASE.to_owned()))?;
    let before = parent.map(memory).transpose()?;
    for (number, chunk) in memory(snapshot)?.chunks(CHUNK).enumerate() {
        match &before {
            Some(before) if before[number * CHUNK..][..chunk.len()] == *chunk => {
                writer.same_as_parent(number as u64)?;
            }
            _ => drop(writer.put(number as u64, chunk)?),
        }
    }
    let summary = writer.finish(snapshot.vcpus, snapshot.fingerprint.clone(), &snapshot.sections)?;
    let mut content = vec![0; DISK_BYTES];
    disk.open(1).read_at(0, &mut content)?;
    fs::write(dir.join(format!("{name}.disk")), content)?;
    println!("{name}: {summary:?}");
    Ok(())
}

/// The blob with zstd frames in the place of its lz4 blocks: this version reads them and does not write any.
fn as_zstd(blob: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let number = |at: usize| usize::from_le_bytes(blob[at..at + 8].try_into().expect("eight bytes"));
    let (head_at, head_length) = (number(16), number(24));
    let mut head: Value = serde_json::from_slice(&blob[head_at..][..head_length])?;
    let range = |of: &Value| {
        let [offset, length] = ["offset", "length"].map(|field| of[field].as_u64().expect("a number") as usize);
        blob[offset..][..length].to_vec()
    };
    let mut out = blob[..64].to_vec();
    let mut index = range(&head["index"]);
    for entry in index.chunks_exact_mut(32) {
        let packed = u32::from_le_bytes(entry[4..8].try_into()?);
        let offset = usize::from_le_bytes(entry[8..16].try_into()?);
        let mut stored = blob[offset..][..(packed & 0xff_ffff) as usize].to_vec();
        let mut kind = packed >> 24;
        if kind == 2 {
            stored = zstd::bulk::compress(&lz4_flex::block::decompress(&stored, CHUNK)?, 19)?;
            kind = 3;
        }
        entry[4..8].copy_from_slice(&(stored.len() as u32 | kind << 24).to_le_bytes());
        entry[8..16].copy_from_slice(&(out.len() as u64).to_le_bytes());
        out.extend(stored);
    }
    head["index"]["offset"] = out.len().into();
    head["index"]["checksum"] =
        format!("{:032x}", u128::from_be_bytes(XxHash3_128::oneshot(&index).to_le_bytes())).into();
    out.extend(index);
    for section in head["sections"].as_array_mut().ok_or("no sections")? {
        let payload = range(section);
        section["offset"] = out.len().into();
        out.extend(payload);
    }
    let head_at = out.len();
    out.extend(serde_json::to_vec(&head)?);
    bare::seal(&mut out, head_at);
    Ok(out)
}
