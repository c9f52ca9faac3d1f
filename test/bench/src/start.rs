//! Times the start of a machine beside its floor, in turns, so that both see the same machine weather:
//!
//! ```text
//!  ovms-bench-floor   spawn ──> first byte on stdout
//!  ovms-vmm           spawn in new namespaces ──> configuration ──> Run ──> first byte on the console
//! ```
//! The VMM is started as the engine starts it, but for the cgroup, whose move is a figure of its own, and for what the
//! engine begins before that (`ovms_engine::birth::Ahead`), whose time is printed, too. Prints one JSON object: the
//! microseconds of every run.
//!
//! Usage: `ovms-bench-start VMM FLOOR KERNEL MEMORY RUNS`

#[allow(dead_code, reason = "shared with the other benches")]
mod vmm;

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ovms_proto::control::Command as Ask;

use self::vmm::{floor, micros, Machine, Source};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What is measured.
struct Bench {
    vmm: PathBuf,
    floor: PathBuf,
    kernel: PathBuf,
    memory: u64,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, least, kernel, memory, runs] = args.as_slice() else {
        return Err("usage: ovms-bench-start VMM FLOOR KERNEL MEMORY RUNS".into());
    };
    let bench = Bench { vmm: vmm.into(), floor: least.into(), kernel: kernel.into(), memory: memory.parse()? };
    let runs: usize = runs.parse()?;
    let (mut floors, mut aheads, mut vmms) = (Vec::new(), Vec::new(), Vec::new());
    let mut first = 0;
    // The first pair warms the page cache and is not counted.
    for run in 0..=runs {
        let least = floor(&bench.floor, bench.memory)?.0;
        let (ahead, vmm) = bench.vmm()?;
        if run == 0 {
            first = micros(ahead);
        } else {
            floors.push(micros(least));
            aheads.push(micros(ahead));
            vmms.push(micros(vmm));
        }
    }
    println!(
        "{}",
        serde_json::json!({ "floor_us": floors, "ahead_us": aheads, "ahead_first_us": first, "vmm_us": vmms })
    );
    Ok(())
}

impl Bench {
    /// How long the engine's work ahead took, and then the VMM to its guest's first byte.
    fn vmm(&self) -> Result<(Duration, Duration)> {
        let kernel = File::open(&self.kernel)?;
        let began = Instant::now();
        let host = vmm::host()?;
        let ahead = began.elapsed();
        let began = Instant::now();
        let mut machine = Machine::create(&self.vmm, host, self.memory, &Source::Kernel(&kernel, ""), false)?;
        machine.ask(Ask::Run, &[])?;
        machine.first_byte()?;
        let took = began.elapsed();
        machine.wait()?;
        Ok((ahead, took))
    }
}
