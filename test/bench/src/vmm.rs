//! What is measured: a VMM as the engine starts it (`ovms_engine::birth`), but for the cgroup, whose move is a figure of
//! its own, and the floor beside it.

use std::fs::File;
use std::io::{pipe, stderr, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ovms_config::vm::{BootConfig, ConsoleConfig, JailConfig, RestoreConfig, StartConfig, VmConfig, VM_CONFIG_VERSION};
use ovms_engine::birth::{Ahead, Birthplace, Cradle, HostFiles, Process};
use ovms_proto::control::{Answer, Command as Ask, Event, FromVmm, Request, SnapshotCommand, SnapshotReport, Timeline};
use ovms_proto::Channel;

use crate::Result;

/// A time as it is printed.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Spawns the floor program with a slot of `memory` bytes and returns the time to its first byte, and how many
/// microseconds of it the kernel took for the slot.
pub(crate) fn floor(program: &Path, memory: u64) -> Result<(Duration, u64)> {
    let (mut reader, writer) = pipe()?;
    let began = Instant::now();
    let mut child = Command::new(program).arg(memory.to_string()).stdout(writer).spawn()?;
    reader.read_exact(&mut [0])?;
    let took = began.elapsed();
    let mut slot = String::new();
    reader.read_to_string(&mut slot)?;
    child.wait()?;
    Ok((took, slot.parse()?))
}

/// What a machine comes from.
pub(crate) enum Source<'a> {
    /// A kernel and its command line.
    Kernel(&'a File, &'a str),
    /// An unpacked RAM snapshot.
    Ram { state: &'a File, memory: &'a File, set: Set<'a> },
}

/// What becomes of a restored machine's working set.
pub(crate) enum Set<'a> {
    /// Nothing.
    Unknown,
    /// It is written here.
    Record(&'a File),
    /// An earlier restore has recorded it.
    ReadAhead(&'a File),
}

/// A machine.
pub(crate) struct Machine {
    process: Process,
    channel: Channel,
    console: PipeReader,
    asked: u64,
    /// How long the VMM's steps took.
    pub(crate) timeline: Timeline,
}

/// What the engine begins before it makes a VMM's cgroup and spawns it.
pub(crate) fn host() -> Result<HostFiles> {
    Ok(Ahead::begin(Path::new("/dev/kvm"), None)?.wait()?)
}

impl Machine {
    /// Starts a VMM and waits until its machine is built; the vCPUs stand still.
    pub(crate) fn create(
        vmm: &Path,
        HostFiles { kvm, cpuid, root, netns }: HostFiles,
        memory: u64,
        source: &Source<'_>,
        mlock: bool,
    ) -> Result<Self> {
        let (console, writer) = pipe()?;
        let (channel, theirs) = Channel::pair()?;
        let process = Process::spawn(Cradle {
            program: vmm,
            id: "bench",
            control: theirs.into(),
            log: stderr().as_fd().try_clone_to_owned()?,
            birthplace: &Birthplace::default(),
        })?;
        let userfault = File::options().read(true).write(true).open("/dev/userfaultfd").ok();
        let mut fds: Vec<BorrowedFd<'_>> =
            vec![kvm.as_fd(), cpuid.as_fd(), root.as_fd(), netns.as_fd(), writer.as_fd()];
        let mut add = |fd| {
            fds.push(fd);
            u32::try_from(fds.len() - 1).unwrap_or(u32::MAX)
        };
        let start = match source {
            Source::Kernel(kernel, cmdline) => {
                StartConfig::Boot(BootConfig { kernel: add(kernel.as_fd()), initrd: None, cmdline: (*cmdline).into() })
            }
            Source::Ram { state, memory, set } => {
                let (state, memory) = (add(state.as_fd()), add(memory.as_fd()));
                let (working_set, record_working_set) = match set {
                    Set::Unknown => (None, None),
                    Set::Record(file) => (None, Some(add(file.as_fd()))),
                    Set::ReadAhead(file) => (Some(add(file.as_fd())), None),
                };
                StartConfig::Restore(RestoreConfig { state, memory, working_set, record_working_set, mlock })
            }
        };
        let userfault = userfault.as_ref().map(|file| add(file.as_fd()));
        channel.send(&config(memory, start, userfault), &fds)?;
        drop(writer);
        match channel.recv::<FromVmm>()?.0 {
            FromVmm::Configured { timeline } => Ok(Self { process, channel, console, asked: 0, timeline }),
            other => Err(format!("the VMM answers {other:?} to its configuration").into()),
        }
    }

    /// Asks without waiting for the answer.
    pub(crate) fn ask(&mut self, command: Ask, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.asked += 1;
        Ok(self.channel.send(&Request { id: self.asked, command }, fds)?)
    }

    /// Waits for the first byte of the guest.
    pub(crate) fn first_byte(&mut self) -> Result<()> {
        Ok(self.console.read_exact(&mut [0])?)
    }

    /// Waits until the guest has said `wanted`.
    pub(crate) fn expect(&mut self, wanted: &str) -> Result<()> {
        let (mut said, mut byte) = (Vec::new(), [0]);
        while !said.ends_with(wanted.as_bytes()) {
            self.console.read_exact(&mut byte)?;
            said.push(byte[0]);
        }
        Ok(())
    }

    /// The guest's next line.
    pub(crate) fn line(&mut self) -> Result<String> {
        let (mut said, mut byte) = (Vec::new(), [0]);
        loop {
            self.console.read_exact(&mut byte)?;
            match byte[0] {
                b'\n' => return Ok(String::from_utf8_lossy(&said).trim_end().to_owned()),
                other => said.push(other),
            }
        }
    }

    /// Takes a RAM snapshot into an empty file.
    pub(crate) fn snapshot(&mut self, blob: &File, stop: bool) -> Result<SnapshotReport> {
        self.ask(Ask::Snapshot(SnapshotCommand { parent: None, stop }), &[blob.as_fd()])?;
        loop {
            match self.channel.recv::<FromVmm>()?.0 {
                FromVmm::Reply { id, result } if id == self.asked => match result? {
                    Answer::Snapshot(report) => return Ok(report),
                    other => return Err(format!("the VMM answers {other:?} to a snapshot").into()),
                },
                FromVmm::Event(Event::Exited(reason)) => {
                    return Err(format!("the machine has ended: {reason:?}").into())
                }
                _ => {}
            }
        }
    }

    /// Waits until its working set is recorded, and ends it.
    pub(crate) fn recorded(self) -> Result<()> {
        loop {
            match self.channel.recv::<FromVmm>()?.0 {
                FromVmm::Event(Event::WorkingSetRecorded) => return self.end(),
                FromVmm::Event(Event::Exited(reason)) => {
                    return Err(format!("the machine has ended without a working set: {reason:?}").into())
                }
                _ => {}
            }
        }
    }

    /// Ends it and waits for its end.
    pub(crate) fn end(self) -> Result<()> {
        self.process.kill()?;
        self.process.reap();
        Ok(())
    }

    /// Waits until the guest has ended by itself.
    pub(crate) fn wait(self) -> Result<()> {
        while !matches!(self.channel.recv::<FromVmm>()?.0, FromVmm::Event(Event::Exited(_))) {}
        self.process.reap();
        Ok(())
    }
}

fn config(memory: u64, start: StartConfig, userfault: Option<u32>) -> VmConfig {
    VmConfig {
        version: VM_CONFIG_VERSION,
        id: "bench".into(),
        vcpus: 1,
        memory,
        kvm: 0,
        cpuid: 1,
        userfault,
        start,
        disks: Vec::new(),
        console: ConsoleConfig { input: None, output: Some(4) },
        jail: JailConfig {
            uid: 1_899_999_999,
            gid: 1_899_999_999,
            root: 2,
            netns: 3,
            hostname: "bench".into(),
            max_file_size: 64 << 30,
            max_open_files: 512,
        },
        log_level: "warn".into(),
    }
}
