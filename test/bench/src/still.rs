//! How long a guest stands still while its RAM snapshot is taken. The guest (`tally.elf`) has written half of its memory
//! and goes on writing it, at no more than RATE MB/s (0: as fast as it can); a clone has written as much again since it was restored.
//!
//! Prints one JSON object for each snapshot: what the VMM reports, and the MB/s that the guest was writing before.
//!
//! Usage: `ovms-bench-still VMM KERNEL MEMORY booted|clone DIR RATE SNAPSHOTS [mlock]`

#[allow(dead_code, reason = "shared with the other benches")]
mod vmm;

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ovms_proto::control::Command as Ask;
use ovms_state::{unpack, Blob, Limits};

use self::vmm::{Machine, Set, Source};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;
/// What the guest writes at a time.
const PAGES: u64 = 2000;
/// For how long the guest's writing is measured.
const WINDOW: Duration = Duration::from_secs(2);

/// What is measured.
struct Bench {
    vmm: PathBuf,
    kernel: PathBuf,
    memory: u64,
    dir: PathBuf,
    /// MB/s; 0: as fast as it can.
    rate: u64,
    mlock: bool,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, kernel, memory, kind, dir, rate, snapshots, rest @ ..] = args.as_slice() else {
        return Err("usage: ovms-bench-still VMM KERNEL MEMORY booted|clone DIR RATE SNAPSHOTS [mlock]".into());
    };
    let (memory, rate, mlock) = (memory.parse()?, rate.parse()?, rest == ["mlock"]);
    let bench = Bench { vmm: vmm.into(), kernel: kernel.into(), memory, dir: dir.into(), rate, mlock };
    let mut machine = match kind.as_str() {
        "booted" => bench.booted()?,
        "clone" => bench.clone_of_booted()?,
        other => return Err(format!("{other} is neither booted nor clone").into()),
    };
    for _ in 0..snapshots.parse::<u32>()? {
        let rate = bench.rate(&mut machine)?;
        let blob = create(&bench.dir.join("blob"))?;
        let report = machine.snapshot(&blob, false)?;
        fs::remove_file(bench.dir.join("blob"))?;
        println!("{}", serde_json::json!({ "rate": rate, "report": report }));
    }
    machine.end()
}

impl Bench {
    /// A machine that has written half of its memory since it was booted.
    fn booted(&self) -> Result<Machine> {
        let cmdline = format!("fill={} disk=0 dirty={PAGES} period=1 rate={}", (self.memory / 2) >> 20, self.rate);
        let kernel = File::open(&self.kernel)?;
        let mut machine =
            Machine::create(&self.vmm, vmm::host()?, self.memory, &Source::Kernel(&kernel, &cmdline), false)?;
        machine.ask(Ask::Run, &[])?;
        count(&mut machine)?;
        Ok(machine)
    }

    /// A clone of such a machine that has written as much again.
    fn clone_of_booted(&self) -> Result<Machine> {
        let mut origin = self.booted()?;
        let blob = create(&self.dir.join("blob"))?;
        origin.snapshot(&blob, true)?;
        origin.end()?;
        let (memory, state) = (create(&self.dir.join("memory"))?, create(&self.dir.join("state"))?);
        let limits = Limits { memory: 1 << 40 };
        unpack(vec![Blob::open(blob)?], &[String::new()], (&memory, &state), 2, limits, &mut |_, _| true)?;
        fs::remove_file(self.dir.join("blob"))?;
        let (state, memory) = (File::open(self.dir.join("state"))?, File::open(self.dir.join("memory"))?);
        let source = Source::Ram { state: &state, memory: &memory, set: Set::Unknown };
        let mut machine = Machine::create(&self.vmm, vmm::host()?, self.memory, &source, self.mlock)?;
        machine.ask(Ask::Run, &[])?;
        let first = count(&mut machine)?;
        while (count(&mut machine)? - first) * PAGES * PAGE < self.memory / 2 {}
        Ok(machine)
    }

    /// MB/s that the guest writes.
    fn rate(&self, machine: &mut Machine) -> Result<f64> {
        // What the guest said while nobody listened is old.
        let settled = Instant::now() + WINDOW;
        while Instant::now() < settled {
            count(machine)?;
        }
        let (first, began) = (count(machine)?, Instant::now());
        let mut last = first;
        while began.elapsed() < WINDOW {
            last = count(machine)?;
        }
        Ok(((last - first) * PAGES * PAGE) as f64 / began.elapsed().as_secs_f64() / 1e6)
    }
}

fn create(path: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create_new(true).open(path)?)
}

/// The guest's next count.
fn count(machine: &mut Machine) -> Result<u64> {
    loop {
        let line = machine.line()?;
        if let Some(number) = line.strip_prefix("count ") {
            return Ok(number.parse()?);
        }
    }
}
