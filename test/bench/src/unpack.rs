//! Times the unpacking of a RAM blob whose memory is the content of a file. The output file is on the file system of DIR.
//! Prints one JSON object: the microseconds of every run, the bytes of memory and those of the blob.
//!
//! Usage: `ovms-bench-unpack SOURCE DIR THREADS RUNS`

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use ovms_state::{unpack, Blob, Fingerprint, Limits, SnapshotWriter, CHUNK};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [source, dir, threads, runs] = args.as_slice() else {
        return Err("usage: ovms-bench-unpack SOURCE DIR THREADS RUNS".into());
    };
    let (dir, threads) = (Path::new(dir), threads.parse()?);
    let source = File::open(source)?;
    let length = source.metadata()?.len() / CHUNK as u64 * CHUNK as u64;
    let writer = SnapshotWriter::create(create(&dir.join("blob"))?, length, None)?;
    let mut chunk = vec![0; CHUNK];
    for number in 0..writer.chunks() {
        source.read_exact_at(&mut chunk, number * CHUNK as u64)?;
        writer.put(number, &chunk)?;
    }
    let bytes = writer.finish(1, Fingerprint::default(), &[])?.bytes;
    let mut times = Vec::new();
    for _ in 0..runs.parse::<u32>()? {
        let (memory, state) = (create(&dir.join("memory"))?, create(&dir.join("state"))?);
        let blob = Blob::open(File::open(dir.join("blob"))?)?;
        let began = Instant::now();
        unpack(vec![blob], &[String::new()], (&memory, &state), threads, Limits { memory: 1 << 40 }, &mut |_, _| true)?;
        times.push(u64::try_from(began.elapsed().as_micros())?);
        fs::remove_file(dir.join("memory"))?;
        fs::remove_file(dir.join("state"))?;
    }
    println!("{}", serde_json::json!({ "unpack_us": times, "memory": length, "blob": bytes }));
    Ok(())
}

fn create(path: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create_new(true).open(path)?)
}
