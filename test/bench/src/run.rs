//! Times a command from its spawn to the first byte that it writes to stdout: `ovm run` of an image whose guest says `x` and
//! powers off.
//!
//! ```text
//!  spawn ──> ovm run IMAGE ──> first byte of the guest ──> end
//!            in turns: as the host is, and where no hierarchy of cgroup version 1 is mounted
//! ```
//! A cgroup of version 1 is made and joined in each hierarchy by itself, which is the host's price and not ours: without
//! those mounts, in a mount namespace of this process's own, the VMM gets one cgroup of version 2 (without the controllers that
//! the host has in version 1, so its memory limit is not set). Prints one JSON object:
//! the microseconds of every run, `host_us` and, where version 1 is mounted, `unified_us`.
//!
//! Usage: `ovms-bench-run RUNS OVM ARG...`

use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{setns, unshare, CloneFlags};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Before each start: the kernel goes on freeing what the machine before had, its network namespace longest, which is a part
/// of its end.
const SETTLE: Duration = Duration::from_millis(100);
const OWN_MOUNTS: &str = "/proc/self/ns/mnt";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [runs, command @ ..] = args.as_slice() else { return Err("usage: ovms-bench-run RUNS OVM ARG...".into()) };
    let runs: usize = runs.parse()?;
    let host = File::open(OWN_MOUNTS)?;
    let unified = without_version_1()?;
    let (mut as_it_is, mut without) = (Vec::new(), Vec::new());
    // The first of each warms up and is not counted.
    for run in 0..=runs {
        setns(&host, CloneFlags::CLONE_NEWNS)?;
        let took = first_byte(command)?;
        let other = match &unified {
            Some(unified) => {
                setns(unified, CloneFlags::CLONE_NEWNS)?;
                Some(first_byte(command)?)
            }
            None => None,
        };
        if run > 0 {
            as_it_is.push(took);
            without.extend(other);
        }
    }
    println!("{}", serde_json::json!({ "host_us": as_it_is, "unified_us": without }));
    Ok(())
}

/// A mount namespace like the host's, but without cgroup version 1; `None` if the host has none.
fn without_version_1() -> Result<Option<File>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let old: Vec<PathBuf> = mounts.lines().filter_map(version_1).collect();
    if old.is_empty() {
        return Ok(None);
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    for point in old {
        umount2(&point, MntFlags::MNT_DETACH)?;
    }
    Ok(Some(File::open(OWN_MOUNTS)?))
}

/// Where a line of mountinfo mounts a hierarchy of version 1 (proc_pid_mountinfo(5)).
fn version_1(line: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    after.starts_with("cgroup ").then(|| before.split(' ').nth(4).map(PathBuf::from))?
}

/// Microseconds from the command's spawn to its first byte.
fn first_byte(command: &[String]) -> Result<u64> {
    let [program, args @ ..] = command else { return Err("no command".into()) };
    sleep(SETTLE);
    let began = Instant::now();
    let mut child = Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut byte = [0];
    let said = child.stdout.as_mut().ok_or("no stdout")?.read(&mut byte);
    let took = began.elapsed();
    let status = child.wait()?;
    if said? != 1 || byte != *b"x" || !status.success() {
        return Err(format!("{command:?} said {byte:?} and ended with {status}").into());
    }
    Ok(u64::try_from(took.as_micros())?)
}
