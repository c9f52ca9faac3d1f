//! Times the start of a restored machine beside its floor, in turns, so that both see the same machine weather:
//!
//! ```text
//!  ovms-bench-floor   spawn ──> first byte on stdout
//!  ovms-vmm           spawn in new namespaces ──> configuration ──> Run ──> first byte on the console
//! ```
//! The snapshot is taken of a guest (`resume.elf`) that has written FILL MiB and waits until it finds itself restored. It is
//! unpacked into DIR and restored once to record its working set, which every counted restore reads ahead, all by the
//! programs' own ways. Prints one JSON object: the microseconds of every run, of each step of the VMM, and of what the
//! engine begins before it spawns the VMM.
//!
//! With `mlock` the VMM locks its memory. With `keep` no machine is ended before the last one has said its byte, and the
//! time of all together is told too.
//!
//! Usage: `ovms-bench-restore VMM FLOOR KERNEL MEMORY FILL RUNS DIR [mlock|keep]`

#[allow(dead_code, reason = "shared with the other benches")]
mod vmm;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ovms_proto::control::Command as Ask;
use ovms_state::{unpack, Blob, Limits};

use self::vmm::{floor, micros, Machine, Set, Source};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Before each start, floor or VMM: the kernel goes on freeing what the machine before had, the longer the larger that was,
/// which is a part of its end and not of the next one's start.
const SETTLE: Duration = Duration::from_millis(20);

/// What is measured.
struct Bench {
    vmm: PathBuf,
    floor: PathBuf,
    kernel: PathBuf,
    memory: u64,
    mlock: bool,
}

/// A RAM snapshot that is ready to be restored.
struct Ram {
    state: File,
    memory: File,
    working_set: File,
}

/// One restore.
struct Restored {
    /// From nothing to all that the engine begins before the spawn.
    ahead: Duration,
    /// From the spawn to the guest's first byte.
    took: Duration,
    steps: Vec<(String, u64)>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, least, kernel, memory, fill, runs, dir, rest @ ..] = args.as_slice() else {
        return Err("usage: ovms-bench-restore VMM FLOOR KERNEL MEMORY FILL RUNS DIR [mlock|keep]".into());
    };
    let (mlock, keep) = (rest == ["mlock"], rest == ["keep"]);
    let bench = Bench { vmm: vmm.into(), floor: least.into(), kernel: kernel.into(), memory: memory.parse()?, mlock };
    let runs: usize = runs.parse()?;
    let ram = bench.take(Path::new(dir), &format!("fill={fill}{}", if keep { " stay=1" } else { "" }))?;
    if keep {
        println!("{}", serde_json::json!({ "all_us": micros(bench.keep(&ram, runs)?), "machines": runs }));
        return Ok(());
    }
    let (mut floors, mut slots, mut aheads, mut vmms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut steps = BTreeMap::<String, Vec<u64>>::new();
    // The first pair warms the page cache and is not counted.
    for run in 0..=runs {
        sleep(SETTLE);
        let (least, slot) = floor(&bench.floor, bench.memory)?;
        sleep(SETTLE);
        let restored = bench.restore(&ram)?;
        if run > 0 {
            floors.push(micros(least));
            slots.push(slot);
            aheads.push(micros(restored.ahead));
            vmms.push(micros(restored.took));
            restored.steps.into_iter().for_each(|(step, at)| steps.entry(step).or_default().push(at));
        }
    }
    println!(
        "{}",
        serde_json::json!({
            "floor_us": floors, "floor_slot_us": slots, "ahead_us": aheads, "restore_us": vmms, "steps_us": steps
        })
    );
    Ok(())
}

impl Bench {
    /// Boots the guest, takes its snapshot, unpacks it and records its working set.
    fn take(&self, dir: &Path, cmdline: &str) -> Result<Ram> {
        let kernel = File::open(&self.kernel)?;
        let mut machine =
            Machine::create(&self.vmm, vmm::host()?, self.memory, &Source::Kernel(&kernel, cmdline), false)?;
        machine.ask(Ask::Run, &[])?;
        machine.expect("waiting\n")?;
        let create = |name: &str| File::options().read(true).write(true).create_new(true).open(dir.join(name));
        let blob = create("ram")?;
        machine.snapshot(&blob, true)?;
        machine.end()?;
        let (memory, state) = (create("memory")?, create("state")?);
        let blob = Blob::open(blob)?;
        let limits = Limits { memory: 1 << 40 };
        unpack(vec![blob], &[String::new()], (&memory, &state), 2, limits, &mut |_, _| true)?;
        let (state, memory) = (File::open(dir.join("state"))?, File::open(dir.join("memory"))?);
        let working_set = create("working-set")?;
        let source = Source::Ram { state: &state, memory: &memory, set: Set::Record(&working_set) };
        let mut machine = Machine::create(&self.vmm, vmm::host()?, self.memory, &source, self.mlock)?;
        machine.ask(Ask::Run, &[])?;
        machine.recorded()?;
        if working_set.metadata()?.len() == 0 {
            return Err("the working set was not recorded".into());
        }
        Ok(Ram { state, memory, working_set })
    }

    fn restore(&self, ram: &Ram) -> Result<Restored> {
        let began = Instant::now();
        let host = vmm::host()?;
        let ahead = began.elapsed();
        let began = Instant::now();
        let mut machine = Machine::create(&self.vmm, host, self.memory, &ram.source(), self.mlock)?;
        machine.ask(Ask::Run, &[])?;
        machine.first_byte()?;
        let took = began.elapsed();
        let steps = std::mem::take(&mut machine.timeline.steps);
        machine.wait()?;
        Ok(Restored { ahead, took, steps })
    }

    fn keep(&self, ram: &Ram, count: usize) -> Result<Duration> {
        let mut machines = Vec::new();
        let began = Instant::now();
        for _ in 0..count {
            let mut machine = Machine::create(&self.vmm, vmm::host()?, self.memory, &ram.source(), self.mlock)?;
            machine.ask(Ask::Run, &[])?;
            machine.first_byte()?;
            machines.push(machine);
        }
        let took = began.elapsed();
        machines.into_iter().try_for_each(Machine::end)?;
        Ok(took)
    }
}

impl Ram {
    fn source(&self) -> Source<'_> {
        Source::Ram { state: &self.state, memory: &self.memory, set: Set::ReadAhead(&self.working_set) }
    }
}
