//! Times the unpacking of a RAM blob whose memory is the content of a file, as a host does it: a worker behind its walls
//! decodes it, and what it made is synced and renamed. All of it lies below DIR. Of a blob that comes from a layout the
//! worker computes the digest, too; the snapshotter has done so while it fetched the blob.
//!
//! Prints one JSON object: the microseconds of every run with and without the digest, the bytes of memory and of the blob.
//!
//! Usage: `ovms-bench-unpack SOURCE DIR THREADS RUNS`

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use ovms_artifact::digest::Digest;
use ovms_bundle::ram::{unpack, RamOptions};
use ovms_bundle::worker::{intercept, Launcher, RamBlob};
use ovms_state::{Fingerprint, SnapshotWriter, CHUNK};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<ExitCode> {
    // This program is its own worker.
    if let Some(code) = intercept() {
        return Ok(code);
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [source, dir, threads, runs] = args.as_slice() else {
        return Err("usage: ovms-bench-unpack SOURCE DIR THREADS RUNS".into());
    };
    let (dir, path) = (Path::new(dir), Path::new(dir).join("blob"));
    let source = File::open(source)?;
    let length = source.metadata()?.len() / CHUNK as u64 * CHUNK as u64;
    let writer =
        SnapshotWriter::create(File::options().read(true).write(true).create_new(true).open(&path)?, length, None)?;
    let mut chunk = vec![0; CHUNK];
    for number in 0..writer.chunks() {
        source.read_exact_at(&mut chunk, number * CHUNK as u64)?;
        writer.put(number, &chunk)?;
    }
    let size = writer.finish(1, Fingerprint::default(), &[])?.bytes;
    let digest = Digest::of(&fs::read(&path)?);
    let options = RamOptions { launcher: Launcher::new(), max_memory: 1 << 40, threads: threads.parse()? };
    let root = dir.join("ram");
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..runs.parse::<u32>()? {
        for (verified, times) in [true, false].into_iter().zip(&mut times) {
            fs::create_dir(&root)?;
            let blobs = vec![RamBlob { digest, size, file: File::open(&path)?, verified }];
            let began = Instant::now();
            unpack(&root, blobs, &options, &mut |_| true)?;
            times.push(u64::try_from(began.elapsed().as_micros())?);
            fs::remove_dir_all(&root)?;
        }
    }
    let [unpack, verify] = times;
    println!("{}", serde_json::json!({ "unpack_us": unpack, "verify_us": verify, "memory": length, "blob": size }));
    Ok(ExitCode::SUCCESS)
}
